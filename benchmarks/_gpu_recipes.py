"""Each recipe on a GPU: captured, silent, repeatable, equal to what it stands for."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import _cuda_graph_probe as probe
import torch
from _gpu_setting import (
    LIVE,
    Setting,
    build_training_step,
    differing,
    hyperparameters_at,
    largest_gap,
    require_one_graph,
)
from _rows import Check, NotRun, Rows
from _training_loops import images_noise_and_times, loss_given_noise
from torch import Tensor, nn

import fusion_compile as fc

SPECTRAL = ("muon", "normuon", "sf_normuon", "full_fusion")
LOSS_TOLERANCE = {"elementwise": 1e-3, "spectral": 1e-2}
"""Relative, on every loss of the trajectory against the eager twin. The spectral recipes round to bfloat16 inside
Newton-Schulz, the compiled one at fewer places than the eager one: where a gradient's singular values are near zero the
two orthogonalize their own rounding. Group float32-newton-schulz has the recipe without that."""
COSINE = {"elementwise": 0.999, "spectral": 0.97}
"""Least cosine between the two displacements of all weights."""


class RecipeChecks:
    """One recipe on one model, compiled once; the checks follow each other and share it.

    `arguments`: of the recipe. `kind`: the key of the tolerances; by default the recipe's own.
    """

    def __init__(self, setting: Setting, recipe: str, kind: str | None = None, **arguments: Any) -> None:
        self.setting, self.recipe, self.arguments = setting, recipe, arguments
        self.kind = kind or ("spectral" if recipe in SPECTRAL else "elementwise")
        self._step: fc.TrainingStep | None = None
        self._batches: list[tuple[Tensor, ...]] = []
        self.start: dict[str, Any] = {}
        self.repeats: bool | None = None
        """Whether the same steps twice gave the same bits; known after `repeats_itself`."""

    @property
    def step(self) -> fc.TrainingStep:
        if self._step is None:
            raise NotRun("the step was not built")
        return self._step

    def batch(self, index: int) -> tuple[Tensor, ...]:
        return self._batches[index % len(self._batches)]

    def one_graph(self, c: Check) -> None:
        setting = self.setting
        model = setting.model()
        self._batches = [images_noise_and_times(model, setting.batch_size, setting.device, i) for i in range(8)]
        step = build_training_step(setting, model, self.recipe, loss_given_noise, **self.arguments)
        self.start = step.state_dict()
        total = setting.steps(200)
        replays, records = [], []
        with tempfile.TemporaryDirectory() as folder, probe.watching() as seen, probe.skipping_is_an_error():
            for i in range(total):
                hyperparameters_at(step, i)
                if i == total // 3:
                    step.save(folder)
                if i == total // 2:
                    step.load(folder)
                    hyperparameters_at(step, i)
                before = seen.replays, seen.recordings
                loss = step(*self.batch(i))
                replays.append(seen.replays - before[0])
                records.append(seen.recordings - before[1])
                self._step = step
        c.require(math.isfinite(float(loss)), f"the loss is {float(loss)} after {total} steps")
        for name in LIVE:
            if name in step.hyperparameters:
                there, asked = float(step.metrics[name]), float(step.hyperparameters[name])  # type: ignore[arg-type]
                c.require(
                    abs(there - asked) <= 1e-6 * abs(asked), f"{name} was set to {asked} and is {there} on the device"
                )
        require_one_graph(c, step, seen, replays, records)
        copied = seen.counted("cudagraph_recorded_non_static_inputs")
        c.require_on_gpu(
            copied <= len(self.batch(0)),
            f"{copied} inputs are copied at every step; the batch has {len(self.batch(0))}",
        )

    def no_wait(self, c: Check) -> None:
        step = self.step
        self._restart(step)
        step(*self.batch(0))
        with probe.waiting_is_an_error(self.setting.device):
            losses = []
            for i in range(self.setting.steps(20)):
                hyperparameters_at(step, i)
                losses.append(step(*self.batch(i)))
            numbers = step.metrics
        c.require_on_gpu(True, "")
        values = [float(loss) for loss in losses]
        c.require(all(map(math.isfinite, values)) and len(set(values)) > 1, f"losses {values[:5]}")
        c.require("grad_norm" in numbers, "no metrics")
        c.note(f"{len(values)} steps and metrics under set_sync_debug_mode('error')")

    def one_launch(self, c: Check) -> None:
        step = self.step
        indices = itertools.count()

        def run() -> None:
            hyperparameters_at(step, index := next(indices))
            step(*self.batch(index))

        run()
        seen = probe.launches(run, self.setting.device, calls=1 if self.setting.dry else 5)
        c.note(str(seen), **seen.__dict__)
        if c.on_gpu and not seen.seen_on_gpu:
            raise NotRun("the profiler sees no kernel on this machine")
        c.require_on_gpu(seen.graphs == seen.calls, f"{seen.graphs} graph launches in {seen.calls} steps")
        c.require_on_gpu(seen.waits == 0, f"the host waited {seen.waits} times")

    def as_eager(self, c: Check) -> None:
        step = self.step
        twin_model = self.setting.model()
        twin = build_training_step(
            self.setting, twin_model, self.recipe, loss_given_noise, mode="eager", **self.arguments
        )
        twin.load_state_dict(self.start)
        self._restart(step)
        count = self.setting.steps(20)
        ours = [float(step(*self.batch(i))) for i in range(count)]
        theirs = [float(twin(*self.batch(i))) for i in range(count)]
        worst = largest_gap(torch.tensor(ours), torch.tensor(theirs))
        one, two = (_displacement(s.model, self.start["model"]) for s in (step, twin))
        cosine = float(one @ two / (one.norm() * two.norm()))
        bound, least = LOSS_TOLERANCE[self.kind], COSINE[self.kind]
        c.note(
            f"{count} losses within {worst:.1e} (bound {bound:g}), cosine of displacements {cosine:.5f} (≥ {least})",
            loss_difference=worst,
            cosine=cosine,
        )
        c.require(worst <= bound and cosine >= least, "the trajectories part")

    def repeats_itself(self, c: Check) -> None:
        """From the same state on the same batches twice, nothing saved: what every bitwise claim stands on."""
        step, count = self.step, self.setting.steps(10)
        runs: list[dict[str, Any]] = []
        for _ in range(2):
            self._restart(step)
            losses = torch.stack([step(*self.batch(i)) for i in range(count)])
            runs.append({"losses": losses, **step.state_dict()})
        apart = differing(runs[0], runs[1])
        self.repeats = not apart
        gap = largest_gap(runs[0]["losses"], runs[1]["losses"])
        c.require(
            self.repeats,
            f"{len(apart)} tensors differ, first {apart[:3]}, losses by {gap:.1e}: a kernel adds in another order each "
            f"time (attention's backward, embeddings); see the check with deterministic algorithms",
        )
        c.note(f"{count} losses and all state bitwise equal")

    def _require_same(self, c: Check, one: Mapping[str, Any], two: Mapping[str, Any]) -> None:
        """Bitwise where the step repeats itself at all; else losses within 1e-4, and the note says so."""
        apart = differing(one, two)
        if not apart:
            c.note("losses and all state bitwise equal")
        elif self.repeats is False:
            gap = largest_gap(one["losses"], two["losses"])
            c.note(f"losses within {gap:.1e}; not bitwise, as two equal runs are not either")
            c.require(gap <= 1e-4, "further apart than rounding")
        else:
            gap = largest_gap(one["losses"], two["losses"])
            c.require(False, f"{len(apart)} tensors differ, first {apart[:3]}, losses by {gap:.1e}")

    def as_without_replay(self, c: Check) -> None:
        """The same kernels, replayed and launched one by one: bitwise."""
        step, count = self.step, self.setting.steps(10)
        if not probe.can_run_without_replay():
            raise NotRun("this torch cannot run the recorded kernels without their graph")
        self._restart(step)
        losses = torch.stack([step(*self.batch(i)) for i in range(count)])
        replayed = {"losses": losses, **step.state_dict()}
        self._restart(step)
        with probe.without_replay(), probe.watching() as seen:
            losses = torch.stack([step(*self.batch(i)) for i in range(count)])
        c.require_on_gpu(seen.replays == 0, f"{seen.replays} replays although they were switched off")
        self._require_same(c, replayed, {"losses": losses, **step.state_dict()})

    def resumes(self, c: Check) -> None:
        step, half = self.step, self.setting.steps(20) // 2
        self._restart(step)
        for i in range(half):
            step(*self.batch(i))
        with tempfile.TemporaryDirectory() as folder:
            step.save(folder)
            losses = torch.stack([step(*self.batch(half + i)) for i in range(half)])
            on = {"losses": losses, **step.state_dict()}
            step.load(folder)
        losses = torch.stack([step(*self.batch(half + i)) for i in range(half)])
        self._require_same(c, on, {"losses": losses, **step.state_dict()})

    def skips(self, c: Check) -> None:
        step = self.step
        self._restart(step)
        step(*self.batch(0))
        x, *rest = self.batch(1)
        bad = x.clone()
        bad.view(-1)[0] = math.nan
        before, skipped = step.state_dict(), float(step.metrics["skipped"])
        loss = step(bad, *rest)
        after = step.state_dict()
        apart = differing(before, after, ignore=("skipped", "steps_called"))
        c.require(math.isnan(float(loss)), f"the loss is {float(loss)}, not NaN")
        c.require(not apart, f"a non-finite step changed {apart[:3]}")
        c.require(float(step.metrics["skipped"]) == skipped + 1, "the skipped step was not counted")
        step(*self.batch(1))
        c.require(bool(differing(after["model"], step.state_dict()["model"])), "the next good step changed nothing")
        c.note("every bit of model and optimizer unchanged, counted, and the next step trains")

    def zero_lr_moves_nothing(self, c: Check) -> None:
        step = self.step
        self._restart(step)
        step(*self.batch(0))
        kept = {name: step.hyperparameters[name] for name in ("lr", "scalar_lr") if name in step.hyperparameters}
        step.hyperparameters.update(dict.fromkeys(kept, 0.0))
        before = step.state_dict()["model"]
        step(*self.batch(1))
        still = float(step.metrics["update_norm"])
        moved = differing(before, step.state_dict()["model"])
        step.hyperparameters.update(kept)
        step(*self.batch(2))
        c.require(
            still == 0 and not moved, f"with lr=0 the update's norm is {still} and {len(moved)} parameters changed"
        )
        c.require(float(step.metrics["update_norm"]) > 0, "with lr restored nothing moves")
        c.note("lr=0 acts at the next replay, and so does its return")

    def _restart(self, step: fc.TrainingStep) -> None:
        step.load_state_dict(self.start)


def _displacement(model: nn.Module, start: Mapping[str, Tensor]) -> Tensor:
    """All weights now minus at the start, as float64; without the queries' and keys' biases, of which softmax ignores a
    part whose gradient is rounding noise and Adam makes of that steps of full size."""
    parts = [
        (p.detach().double() - start[name].double().to(p.device)).flatten()
        for name, p in model.named_parameters()
        if not name.endswith("qkv.bias")
    ]
    return torch.cat(parts)


def recipe_group(recipe: str) -> Callable[[Rows, Setting], None]:
    def group(rows: Rows, setting: Setting) -> None:
        checks = RecipeChecks(setting, recipe)
        rows.check("one CUDA graph over 200 steps, live numbers, a load", checks.one_graph)
        rows.check("no wait for the GPU", checks.no_wait)
        rows.check("one graph launch a step", checks.one_launch)
        rows.check("a non-finite step changes nothing", checks.skips)
        rows.check("two equal runs are bitwise equal", checks.repeats_itself)
        rows.check("resume is bitwise", checks.resumes)
        rows.check("a new lr acts at once", checks.zero_lr_moves_nothing)
        rows.check("as eager", checks.as_eager)
        rows.check("as the same kernels without a graph", checks.as_without_replay)

    return group


def float32_newton_schulz(rows: Rows, setting: Setting) -> None:
    """SF-NorMuon with nothing rounded to bfloat16: its replay and its eager twin must agree as AdamW's do."""
    checks = RecipeChecks(setting, "sf_normuon", "elementwise", matmul_dtype=torch.float32)
    rows.check("one CUDA graph over 200 steps, live numbers, a load", checks.one_graph)
    rows.check("as eager", checks.as_eager)


def autotuned(recipe: str) -> Callable[[Rows, Setting], None]:
    """The default mode of a GPU, ``max-autotune``: captured, and equal to the same mode without CUDA graphs."""

    def group(rows: Rows, setting: Setting) -> None:
        losses: dict[str, Tensor] = {}

        def run(c: Check, mode: str) -> None:
            model = setting.model()
            batches = [images_noise_and_times(model, setting.batch_size, setting.device, i) for i in range(4)]
            step = build_training_step(setting, model, recipe, loss_given_noise, mode=mode)
            replays, records, out = [], [], []
            with probe.watching() as seen:
                for i in range(setting.steps(20)):
                    before = seen.replays, seen.recordings
                    out.append(step(*batches[i % 4]))
                    replays.append(seen.replays - before[0])
                    records.append(seen.recordings - before[1])
            losses[mode] = torch.stack(out)
            if mode == "max-autotune":
                require_one_graph(c, step, seen, replays, records)
            else:
                c.require(sum(replays) == 0, f"{sum(replays)} replays in a mode without CUDA graphs")

        def equal(c: Check) -> None:
            run(c, "max-autotune-no-cudagraphs")
            if "max-autotune" not in losses:
                raise NotRun("there is no replayed run to compare with")
            one, two = losses.values()
            worst = largest_gap(one, two)
            c.note("bitwise equal" if torch.equal(one, two) else f"losses within {worst:.1e}: the two were tuned apart")
            c.require(
                worst <= LOSS_TOLERANCE["spectral" if recipe in SPECTRAL else "elementwise"], "the trajectories part"
            )

        rows.check("max-autotune is one CUDA graph", lambda c: run(c, "max-autotune"))
        rows.check("as max-autotune-no-cudagraphs", equal)

    return group
