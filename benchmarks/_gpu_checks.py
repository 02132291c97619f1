"""What only a GPU can settle, check by check. Each group is a function of its rows and of the setting."""

from __future__ import annotations

import inspect
import itertools
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import _cuda_graph_probe as probe
import torch
from _measure import machine, tensor_bytes, wait
from _rows import Check, NotRun, Rows
from _training_loops import build, images, images_noise_and_times, loss_drawing_noise, loss_given_noise
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc

RECIPES = tuple(fc.optim.RECIPES)
SPECTRAL = ("muon", "normuon", "sf_normuon")
LIVE = ("lr", "scalar_lr", "weight_decay", "scalar_weight_decay", "beta", "momentum", "clip_grad_norm")
"""Hyperparameters that change at every step, those of them that a recipe has."""

LOSS_TOLERANCE = {"elementwise": 1e-3, "spectral": 1e-2}
"""Relative, on every loss of the trajectory against the eager twin. The spectral recipes round to bfloat16 inside
Newton-Schulz, the compiled one at fewer places than the eager one: where a gradient's singular values are near zero the
two orthogonalize their own rounding. Group float32-newton-schulz has the recipe without that."""
COSINE = {"elementwise": 0.999, "spectral": 0.97}
"""Least cosine between the two displacements of all weights."""


@dataclass(frozen=True)
class Setting:
    """`dry`: on a CPU with tiny models, to see that every check runs. `mode`: of the capture checks."""

    device: torch.device
    dry: bool
    mode: str

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def options(self, recipe: str, mode: str | None = None) -> dict[str, Any]:
        """`mode` and `backend` of a step. A dry run captures AdamW's graph and leaves the others uncompiled."""
        if not self.dry:
            return {"mode": mode or self.mode}
        return {"backend": "aot_eager"} if recipe == "adamw" and mode is None else {"mode": "eager"}

    def model(self, **changes: Any) -> DiT:
        """A DiT-S/2 of four blocks without label dropout; dry, one of width 128, the least with spectral matrices."""
        shape: dict[str, Any]
        if self.dry:
            shape = {"input_size": 8, "hidden_size": 128, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}
        else:
            shape = {
                "input_size": 32,
                "in_channels": 4,
                "hidden_size": 384,
                "depth": 4,
                "num_heads": 6,
                "num_classes": 1000,
            }
        return build(lambda: DiT(**{**shape, "class_dropout_prob": 0.0, **changes}), self.device)

    def steps(self, many: int) -> int:
        return 4 if self.dry else many

    @property
    def batch_size(self) -> int:
        return 2 if self.dry else 32


def differing(a: Mapping[str, Any], b: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """Names below which two nested states are not bitwise equal."""
    out = []
    for key in sorted(a.keys() | b.keys()):
        one, two = a.get(key), b.get(key)
        if key in ignore:
            continue
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            out += [f"{key}.{name}" for name in differing(one, two, ignore)]
        elif isinstance(one, Tensor) and isinstance(two, Tensor):
            same = one.shape == two.shape and one.dtype == two.dtype
            out += [] if same and torch.equal(_bits(one), _bits(two)) else [key]
        elif one != two:
            out.append(key)
    return out


def _gap(one: Tensor, two: Tensor) -> float:
    """The largest relative difference of two rows of losses."""
    return float(((one - two).abs() / two.abs()).max())


def _bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous().reshape(-1)
    return t.view(torch.uint8) if t.numel() else t


def hyperparameters_at(step: fc.TrainingStep, index: int) -> None:
    """Give every `LIVE` hyperparameter another value, a function of `index` alone."""
    for name in LIVE:
        if name not in step.hyperparameters:
            continue
        wave = 1 + 0.1 * math.sin(1 + index)
        if name == "clip_grad_norm":
            value = 2.0 * wave
        elif name in ("beta", "momentum"):
            value = 0.85 + 0.05 * wave
        elif "weight_decay" in name:
            value = 0.02 * wave
        else:
            value = 1e-3 * wave
        step.hyperparameters[name] = value


def build_training_step(
    setting: Setting, model: nn.Module, recipe: str, loss_fn: Any, mode: str | None = None, **arguments: Any
) -> fc.TrainingStep:
    """A step of `recipe`. `mode`: instead of the setting's. `arguments`: of the recipe or ``compile_training_step``."""
    of_recipe = {k: v for k, v in arguments.items() if k in inspect.signature(fc.optim.RECIPES[recipe]).parameters}
    of_step = {k: v for k, v in arguments.items() if k not in of_recipe}
    optimizer = fc.optim.RECIPES[recipe](**of_recipe)
    return fc.compile_training_step(model, loss_fn, optimizer=optimizer, **setting.options(recipe, mode), **of_step)


def require_one_graph(
    c: Check, step: fc.TrainingStep, seen: probe.Witness, replays: list[int], records: list[int]
) -> None:
    """`replays`, `records`: counted at each call of the step; the first compiles and warms up, the second records."""
    captured = step.mode != "eager"
    c.require(len(step.programs) == int(captured), f"{len(step.programs)} programs were captured, not one")
    skips = seen.counted("cudagraph_skips")
    c.require(skips == 0 or not c.on_gpu, f"Inductor left CUDA graphs alone {skips} times: {_why(seen)}")
    pieces = [g.partitions for g in seen.compiled if g.partitions is not None]
    c.require_on_gpu(len(seen.compiled) == 1, f"Inductor finished {len(seen.compiled)} graphs, not one")
    c.require_on_gpu(pieces in ([], [1]), f"the graph is cut into {pieces} CUDA graphs; {_why(seen)}")
    c.require_on_gpu(not any(g.refusals for g in seen.compiled), _why(seen))
    c.require_on_gpu(records[1] == 1, f"{records[1]} CUDA graphs were recorded at the second call, not one")
    again = [i for i, n in enumerate(records) if i > 1 and n]
    c.require_on_gpu(not again, f"recorded again at steps {again[:10]}")
    odd = [i for i, n in enumerate(replays) if i > 1 and n != 1]
    c.require_on_gpu(not odd, f"steps {odd[:10]} made {[replays[i] for i in odd[:10]]} replays, not one")
    forest = probe.trees(step.layout.device)
    if forest is not None:
        c.require(forest.graphs == 1, f"the tree manager holds {forest.graphs} recorded graphs, not one")
        c.note(f"tree: {forest.graphs} graph, {forest.failed_to_match} calls without a match")
    c.note(
        f"{len(replays)} steps, {sum(replays[2:])} replays, partitions {pieces or 'none told'}, "
        f"{seen.counted('cudagraph_recorded_non_static_inputs')} inputs copied per replay"
    )


def _why(seen: probe.Witness) -> str:
    reasons = [reason for g in seen.compiled for reason in g.refusals]
    loose = [g.written_not_static for g in seen.compiled]
    return f"reasons told: {reasons or 'none'}; inputs written that are not static: {loose}"


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
        worst = _gap(torch.tensor(ours), torch.tensor(theirs))
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
        runs = []
        for _ in range(2):
            self._restart(step)
            losses = torch.stack([step(*self.batch(i)) for i in range(count)])
            runs.append({"losses": losses, **step.state_dict()})
        apart = differing(*runs)
        self.repeats = not apart
        gap = _gap(runs[0]["losses"], runs[1]["losses"])
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
            gap = _gap(one["losses"], two["losses"])
            c.note(f"losses within {gap:.1e}; not bitwise, as two equal runs are not either")
            c.require(gap <= 1e-4, "further apart than rounding")
        else:
            c.require(
                False,
                f"{len(apart)} tensors differ, first {apart[:3]}, losses by {_gap(one['losses'], two['losses']):.1e}",
            )

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
    checks = RecipeChecks(setting, "sf_normuon", "elementwise", hot_dtype=torch.float32)
    rows.check("one CUDA graph over 200 steps, live numbers, a load", checks.one_graph)
    rows.check("as eager", checks.as_eager)


def detectors(rows: Rows, setting: Setting) -> None:
    """The machine, and whether the witnesses see what they must: a check that cannot fail proves nothing."""

    def machine_told(c: Check) -> None:
        facts = machine(setting.device)
        c.note(", ".join(f"{k} {v}" for k, v in facts.items()), **facts)

    def wait_is_seen(c: Check) -> None:
        x = torch.ones((), device=setting.device)
        caught = False
        try:
            with probe.waiting_is_an_error(setting.device):
                x.item()
        except RuntimeError:
            caught = True
        c.require_on_gpu(caught, "set_sync_debug_mode('error') let .item() pass")
        c.note("set_sync_debug_mode stops .item()" if caught else "nothing to stop here")

    def graphs_are_counted(c: Check) -> None:
        if not setting.on_gpu:
            c.require_on_gpu(False, "")
            return
        x = torch.ones(8, device=setting.device)
        with probe.watching() as seen:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.add_(1)
            graph.replay()
            graph.replay()
        c.require((seen.recordings, seen.replays) == (1, 2), f"one recording and two replays count as {seen}")
        launches = probe.launches(graph.replay, setting.device)
        c.note(f"profiler: {launches}")
        c.require(launches.graphs == launches.calls, "the profiler does not count graph launches here")

    rows.check("machine", machine_told)
    rows.check("a wait is seen", wait_is_seen)
    rows.check("recordings, replays and launches are seen", graphs_are_counted)


def noise(rows: Rows, setting: Setting) -> None:
    """A loss that draws on the device, label dropout, accumulation, half precision; another model in between."""

    def build_step(**options: Any) -> fc.TrainingStep:
        model = setting.model(depth=1 if setting.dry else 2, hidden_size=128, num_heads=2, **options.pop("shape", {}))
        mode = "eager" if setting.dry else None
        return build_training_step(setting, model, "adamw", loss_drawing_noise, mode=mode, **options)

    def data(step: fc.TrainingStep) -> tuple[Tensor, ...]:
        assert isinstance(step.model, DiT)
        return images(step.model, 2 * setting.batch_size, setting.device)

    def one_graph(c: Check, **options: Any) -> fc.TrainingStep:
        step = build_step(**options)
        batch = data(step)
        replays, records = [], []
        with probe.watching() as seen, probe.skipping_is_an_error():
            for _ in range(setting.steps(20)):
                before = seen.replays, seen.recordings
                loss = step(*batch)
                replays.append(seen.replays - before[0])
                records.append(seen.recordings - before[1])
        c.require(math.isfinite(float(loss)), f"the loss is {float(loss)}")
        require_one_graph(c, step, seen, replays, records)
        return step

    def resumed_elsewhere(c: Check, step: fc.TrainingStep, batch: tuple[Tensor, ...], **options: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            step.save(folder)
            losses = torch.stack([step(*batch) for _ in range(5)])
            on = {"losses": losses, **step.state_dict()}
            other = build_step(**options)
            other.load(folder)
        losses = torch.stack([other(*batch) for _ in range(5)])
        apart = differing(on, {"losses": losses, **other.state_dict()})
        gap = _gap(on["losses"], losses)
        c.require(
            not apart,
            f"a new step from the checkpoint: {len(apart)} tensors differ, first {apart[:3]}, losses by {gap:.1e}",
        )
        c.note("a new step from the checkpoint repeats losses and state bitwise, its first call not replayed")

    def fresh_and_repeatable(c: Check) -> None:
        step = one_graph(c)
        batch = data(step)
        step.hyperparameters["lr"] = 0.0
        losses = [float(step(*batch)) for _ in range(6)]
        c.require(len(set(losses)) == 6, f"with lr=0 six replays gave {len(set(losses))} losses: noise is repeated")
        step.hyperparameters["lr"] = 1e-3
        c.note("fresh noise at every replay")
        resumed_elsewhere(c, step, batch)

    def labels_that_repeat(c: Check, **options: Any) -> None:
        dropout = {"shape": {"class_dropout_prob": 0.5}, **options}
        step = one_graph(c, **dropout)
        x, y = data(step)
        resumed_elsewhere(c, step, (x, y.clamp(max=1)), **dropout)

    def deterministic(c: Check) -> None:
        if setting.on_gpu and "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
            raise NotRun("CUBLAS_WORKSPACE_CONFIG is not set")
        torch.use_deterministic_algorithms(True)
        try:
            labels_that_repeat(c)
        finally:
            torch.use_deterministic_algorithms(False)

    def beside_another(c: Check) -> None:
        step = build_step()
        batch = data(step)
        other = setting.model().eval()
        x, y = images(other, 2, setting.device)
        t = torch.full((2,), 0.5, device=setting.device)
        how = {"backend": "eager"} if setting.dry else {"mode": setting.mode}
        compiled = torch.compile(other, **how)
        with probe.watching() as seen:
            for i in range(12):
                if i == 6:
                    before = seen.recordings, seen.replays
                step(*batch)
                with torch.no_grad():
                    compiled(x, t, y)
        records, replays = seen.recordings - before[0], seen.replays - before[1]
        c.note(f"six rounds of a step and of another compiled model: {records} recordings, {replays} replays")
        c.require_on_gpu((records, replays) == (0, 12), "the two disturb each other's recordings")

    rows.check("noise is drawn in the graph, resume repeats it", fresh_and_repeatable)
    _forget()
    rows.check("accumulate=2 and clipping", lambda c: void(one_graph(c, accumulate=2, clip_grad_norm=1.0)))
    _forget()
    rows.check("compute_dtype=bfloat16", lambda c: void(one_graph(c, compute_dtype=torch.bfloat16)))
    _forget()
    rows.check("another compiled model in between", beside_another)
    _forget()
    rows.check("label dropout, labels that repeat: resume is bitwise", labels_that_repeat)
    _forget()
    rows.check("the same with deterministic algorithms", deterministic)


def void(_: object) -> None:
    """For a lambda that must return nothing."""


def _forget() -> None:
    probe.forget_everything()


def sampler(rows: Rows, setting: Setting) -> None:
    """Exactness, capture and memory of `optimize_sampler`."""
    n_steps, size = (3, 2) if setting.dry else (20, 4)
    model = setting.model().eval()
    x, y = images(model, size, setting.device)
    made: list[fc.Sampler] = []

    def times(s: fc.Sampler) -> Iterator[Tensor]:
        for t in s.timesteps.to(setting.device):
            yield t.expand(size).clone()

    def exact(c: Check) -> None:
        eager = fc.optimize_sampler(model, n_steps, mode="eager")
        with torch.no_grad():
            worst = max(float((eager(x, t, y) - model(x, t, y)).abs().max()) for t in times(eager))
        c.require(worst == 0, f"in mode='eager' the sampler differs from the model by {worst:.3g}")
        c.note(f"mode='eager' is bitwise the model at {n_steps} steps")

    def captured(c: Check) -> None:
        with probe.watching() as seen, probe.skipping_is_an_error():
            fast = fc.optimize_sampler(model, n_steps, mode=setting.options("", setting.mode)["mode"])
            made.append(fast)
            with torch.no_grad():
                for t in itertools.chain(times(fast), times(fast), times(fast)):
                    fast(x, t, y)
                before = seen.replays, seen.recordings
                for t in times(fast):
                    fast(x, t, y)
        skips = seen.counted("cudagraph_skips")
        replays, records = seen.replays - before[0], seen.recordings - before[1]
        c.note(f"{replays} replays and {records} recordings in {n_steps} steps, {skips} skips")
        c.require_on_gpu(skips == 0, _why(seen))
        c.require_on_gpu(replays == n_steps and records == 0, "not one replay a step")

    def near(c: Check) -> None:
        fast = _made(made)
        compiled = torch.compile(
            model, mode=None if setting.on_gpu else "default", backend="inductor" if setting.on_gpu else "eager"
        )
        ours = theirs = scale = 0.0
        with torch.no_grad():
            for t in times(fast):
                want = model(x, t, y)
                ours = max(ours, float((fast(x, t, y) - want).abs().max()))
                theirs = max(theirs, float((compiled(x, t, y) - want).abs().max()))
                scale = max(scale, float(want.abs().max()))
        c.note(
            f"largest difference from eager {ours:.2e}, of torch.compile(model) {theirs:.2e}, outputs up to {scale:.2g}"
        )
        c.require(ours <= 3 * theirs + 1e-5 * scale, "the sampler is further from eager than torch.compile(model) is")

    def waits_of_the_loop(c: Check) -> None:
        fast = _made(made)
        with warnings.catch_warnings(record=True) as caught, probe.waiting_is_an_error(setting.device, "warn"):
            warnings.simplefilter("always")
            fast.sample(x, y)
        waits = sum("synchroniz" in str(w.message) for w in caught)
        c.require_on_gpu(waits < n_steps, f"sample() waited {waits} times in {n_steps} steps")
        c.note(f"sample() of {n_steps} steps waited {waits} times, all before the loop if fewer than the steps")

    def freed(c: Check) -> None:
        fast = _made(made)
        t = next(times(fast))
        with torch.no_grad():
            want = fast(x, t, y).clone()
        wait(setting.device)
        held = tensor_bytes(model.parameters())
        allocated = torch.cuda.memory_allocated(setting.device) if setting.on_gpu else 0
        told = fast.free_hoisted_weights(to="drop")
        gone = held - tensor_bytes(model.parameters())
        c.require(told > 0, "nothing was freed")
        if setting.on_gpu:
            torch.cuda.synchronize(setting.device)
            gone = allocated - torch.cuda.memory_allocated(setting.device)
        c.note(f"{told / 2**20:.2f} MiB told, {gone / 2**20:.2f} MiB seen gone, of {held / 2**20:.2f} MiB of weights")
        c.require_on_gpu(gone >= told, "memory_allocated() fell by less than was told")
        with torch.no_grad():
            c.require(torch.equal(want, fast(x, t, y)), "the output changed")

    rows.check("exact against the model", exact)
    rows.check("the body is one CUDA graph", captured)
    rows.check("as near to eager as torch.compile(model)", near)
    rows.check("sample() does not wait in its loop", waits_of_the_loop)
    rows.check("the bytes told are freed", freed)


def _made(made: list[fc.Sampler]) -> fc.Sampler:
    if not made:
        raise NotRun("the sampler was not built")
    return made[0]


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
            worst = _gap(one, two)
            c.note("bitwise equal" if torch.equal(one, two) else f"losses within {worst:.1e}: the two were tuned apart")
            c.require(
                worst <= LOSS_TOLERANCE["spectral" if recipe in SPECTRAL else "elementwise"], "the trajectories part"
            )

        rows.check("max-autotune is one CUDA graph", lambda c: run(c, "max-autotune"))
        rows.check("as max-autotune-no-cudagraphs", equal)

    return group
