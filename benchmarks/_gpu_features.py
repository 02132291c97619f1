"""What is not one recipe's: the witnesses themselves, noise in the loss, other models beside a step."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import _cuda_graph_probe as probe
import torch
import torch.nn.functional as F
from _gpu_setting import Setting, build_training_step, differing, largest_gap, require_one_graph
from _measure import machine
from _rows import Check, NotRun, Rows
from _training_loops import images, loss_drawing_noise
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc


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
        return steps_in_one_graph(c, step, data(step))

    def steps_in_one_graph(c: Check, step: fc.TrainingStep, batch: tuple[Tensor, ...]) -> fc.TrainingStep:
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

    def resumed_elsewhere(
        c: Check,
        step: fc.TrainingStep,
        batch: tuple[Tensor, ...],
        build: Callable[..., fc.TrainingStep] = build_step,
        **options: Any,
    ) -> None:
        with tempfile.TemporaryDirectory() as folder:
            step.save(folder)
            losses = torch.stack([step(*batch) for _ in range(5)])
            on = {"losses": losses, **step.state_dict()}
            other = build(**options)
            other.load(folder)
        losses = torch.stack([other(*batch) for _ in range(5)])
        apart = differing(on, {"losses": losses, **other.state_dict()})
        gap = largest_gap(on["losses"], losses)
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

    def many_tokens(c: Check) -> None:
        """More than 3,072 indices: torch's own gradient of an embedding cannot be recorded in a CUDA graph then."""

        def build() -> fc.TrainingStep:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 100)).to(setting.device)
            mode = "eager" if setting.dry else None
            return build_training_step(setting, model, "adamw", next_token, mode=mode)

        tokens = torch.randint(100, (32, 257), device=setting.device)
        resumed_elsewhere(c, steps_in_one_graph(c, build(), (tokens,)), (tokens,), build)

    def beside_another(c: Check) -> None:
        step = build_step()
        batch = data(step)
        other = setting.model().eval()
        x, y = images(other, 2, setting.device)
        t = torch.full((2,), 0.5, device=setting.device)
        how: dict[str, Any] = {"backend": "eager"} if setting.dry else {"mode": setting.mode}
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
    rows.check("an embedding of 8,192 tokens: resume is bitwise", many_tokens)
    _forget()
    rows.check("the same with deterministic algorithms", deterministic)


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def void(_: object) -> None:
    """For a lambda that must return nothing."""


def _forget() -> None:
    probe.forget_everything()
