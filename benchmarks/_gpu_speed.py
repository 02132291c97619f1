"""Speed and peak memory on a GPU, each contender built after the other in one process and timed by turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import _cuda_graph_probe as probe
import torch
from _gpu_setting import Setting
from _measure import Timing, compare, interleaved, tensor_bytes, wait
from _rows import Check, NotRun, Rows
from _training_loops import (
    Step,
    build,
    compiled_model_loop,
    dit_b_2,
    dit_s_2,
    image_shape,
    images,
    in_bfloat16,
    loss_drawing_noise,
    manual_graph_loop,
)
from dit import DiT
from torch import Tensor

import fusion_compile as fc
from fusion_compile.training_step import TrainingStep

LOOP, AGAIN, MANUAL = "compiled model + AdamW(fused)", "the same again", "manual CUDA graph, capturable AdamW"
MODE = "max-autotune"
BUDGETS = {"fusion_compile adamw": 1.0, "fusion_compile sf_normuon": 1.1}
"""Largest ratio of a whole step to `LOOP`, as docs/performance.md states it."""
MEMORY_BUDGET = 1.005
"""Largest ratio of the highest points of memory: no higher, and half a percent for the allocator's rounding."""


def train_speed(rows: Rows, setting: Setting, *, batch_size: int = 256, rounds: int = 12) -> None:
    """DiT-B/2 on 256-pixel latents under bfloat16 autocast: our steps, the ordinary loop and a hand-made graph."""
    device = setting.device
    make: Callable[[], DiT] = (lambda: DiT(8, 2, 1, 128, 1, 2, 1.0)) if setting.dry else dit_b_2
    size, rounds, calls = (2, 2, 1) if setting.dry else (batch_size, rounds, 3)
    loss_fn = in_bfloat16(loss_drawing_noise)
    steps: dict[str, Step] = {}
    peaks: dict[str, int] = {}
    batch: list[tuple[Tensor, ...]] = []
    gradient_bytes = [1]

    def loop(model: DiT) -> Step:
        return compiled_model_loop(model, loss_fn, **_how(setting, MODE)).step

    def manual(model: DiT) -> Step:
        return manual_graph_loop(model, loss_fn, batch[0], **_how(setting, "max-autotune-no-cudagraphs")).step

    def ours(recipe: str, **options: Any) -> Callable[[DiT], Step]:
        how: dict[str, Any] = {"mode": "eager"} if setting.dry else {"mode": MODE}
        return lambda model: fc.compile_training_step(model, loss_fn, optimizer=recipe, **how, **options)

    def add(name: str, contender: Callable[[DiT], Step]) -> Callable[[Check], None]:
        def body(c: Check) -> None:
            held = torch.cuda.memory_allocated(device) if setting.on_gpu else 0
            began = time.monotonic()
            model = build(make, device)
            gradient_bytes[0] = tensor_bytes(model.parameters())
            if not batch:
                batch.append(images(model, size, device))
            step = contender(model)
            with probe.watching() as seen:
                step(*batch[0])
                wait(device)
                first = time.monotonic() - began
                if setting.on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
                for _ in range(4):
                    loss = step(*batch[0])
                wait(device)
            steps[name] = step
            c.require(bool(torch.isfinite(loss)), f"the loss is {float(loss)}")
            c.note(f"first call {first:.0f} s", first_call_s=first)
            # The manual graph was recorded before the count began.
            if setting.on_gpu and name != MANUAL:
                peaks[name] = torch.cuda.max_memory_allocated(device) - held
                c.note(f"peak {peaks[name] / 2**30:.2f} GiB", peak_bytes=peaks[name])
            if setting.on_gpu:
                skips = seen.counted("cudagraph_skips")
                c.note(f"{seen.recordings} graphs recorded, {seen.replays} replays, {skips} skips")
                if isinstance(step, TrainingStep):
                    c.require(skips == 0, "Inductor left CUDA graphs alone")
                    c.require(seen.replays == 4, f"{seen.replays} replays in four steps")

        return body

    def memory(name: str) -> Callable[[Check], None]:
        def body(c: Check) -> None:
            if name not in peaks or LOOP not in peaks:
                if setting.on_gpu:
                    raise NotRun("not both were measured")
                c.require_on_gpu(False, "")
                return
            ratio = peaks[name] / peaks[LOOP]
            excess = (peaks[name] - peaks[LOOP]) / gradient_bytes[0]
            c.note(
                f"{ratio:.3f} of the ordinary loop's, budget {MEMORY_BUDGET}; {excess:+.2f} times all gradients",
                ratio=ratio,
            )
            c.require(ratio <= MEMORY_BUDGET, "over the budget")

        return body

    def timed(c: Check) -> dict[str, Timing]:
        if LOOP not in steps:
            raise NotRun("the ordinary loop was not built")
        contenders = {name: _once(step, batch[0]) for name, step in steps.items()}
        contenders[AGAIN] = contenders[LOOP]
        timings = compare(interleaved(contenders, device, rounds=rounds, calls=calls), LOOP)
        for name, t in timings.items():
            c.note(f"{name} {t.ms:.2f} ms, {t.ratio:.3f}", **{name: t.__dict__})
        return timings

    shape = image_shape(build(make, torch.device("cpu")))
    rows.add(
        "problem",
        "ok",
        f"batch {size} of {shape}, bfloat16 autocast, {'eager' if setting.dry else MODE}, noise drawn inside",
    )
    results: dict[str, Timing] = {}

    def judge(name: str) -> Callable[[Check], None]:
        def body(c: Check) -> None:
            if name not in results:
                raise NotRun("not timed")
            noise = abs(results[AGAIN].ratio - 1) + 0.005
            c.note(f"{results[name].ratio:.3f} of the ordinary loop, budget {BUDGETS[name]}, noise {noise:.3f}")
            c.require_on_gpu(results[name].ratio <= BUDGETS[name] + noise, "over the budget")

        return body

    rows.check(f"build: {LOOP}", add(LOOP, loop))
    rows.check("build: fusion_compile adamw", add("fusion_compile adamw", ours("adamw")))
    rows.check("times of two", lambda c: results.update(timed(c)))
    rows.check("peak memory: adamw", memory("fusion_compile adamw"))
    rows.check("build: fusion_compile sf_normuon", add("fusion_compile sf_normuon", ours("sf_normuon")))
    rows.check(f"build: {MANUAL}", add(MANUAL, manual))
    rows.check("times of all", lambda c: results.update(timed(c)))
    rows.check("peak memory: sf_normuon", memory("fusion_compile sf_normuon"))
    for name in BUDGETS:
        rows.check(f"budget: {name}", judge(name))


def _how(setting: Setting, mode: str) -> dict[str, Any]:
    """Of a peer's ``torch.compile``; a dry run does not wait for Inductor."""
    return {"backend": "eager"} if setting.dry else {"mode": mode}


def _once(step: Step, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    def run() -> object:
        # Contenders take turns here, and Inductor's trees must not take one's graph for the successor of another's.
        torch.compiler.cudagraph_mark_step_begin()
        return step(*batch)

    return run


def sampler_speed(rows: Rows, setting: Setting, *, size: int = 4, n_steps: int = 20) -> None:
    """DiT-S/2, one call of the sampler against one call of the compiled model, in the same mode."""
    device = setting.device
    size, n_steps, rounds, calls = (2, 3, 2, 1) if setting.dry else (size, n_steps, 15, 20)
    model = build((lambda: DiT(8, 2, 1, 64, 1, 2)) if setting.dry else dit_s_2, device).eval()
    x, y = images(model, size, device)

    def body(c: Check) -> None:
        fast = fc.optimize_sampler(model, n_steps, mode="eager" if setting.dry else MODE)
        compiled = torch.compile(model, **_how(setting, MODE))
        times = [t.expand(size).clone() for t in fast.timesteps.to(device)]

        def through(call: Callable[..., Tensor]) -> Callable[[], object]:
            schedule = itertools.cycle(times)

            def run() -> object:
                torch.compiler.cudagraph_mark_step_begin()
                with torch.no_grad():
                    return call(x, next(schedule), y)

            return run

        names = ("compiled model", "sampler", "compiled model again")
        contenders = dict(zip(names, map(through, (compiled, fast, compiled)), strict=True))
        # Two schedules until the sampler trusts its caller and stops looking at the timestep.
        warmup = 3 * n_steps
        timings = compare(interleaved(contenders, device, rounds=rounds, calls=calls, warmup=warmup), "compiled model")
        for name, t in timings.items():
            c.note(f"{name} {t.ms:.3f} ms, {t.ratio:.3f}", **{name: t.__dict__})
        noise = abs(timings["compiled model again"].ratio - 1) + 0.005
        c.require_on_gpu(timings["sampler"].ratio <= 1 + noise, "slower than the compiled model")

    def whole(c: Check) -> None:
        fast = fc.optimize_sampler(model, n_steps, mode="eager" if setting.dry else MODE)
        for _ in range(3):
            fast.sample(x, y)
        timings = compare(interleaved({"sample()": lambda: fast.sample(x, y)}, device, rounds=5), "sample()")
        ms = timings["sample()"].ms / n_steps
        c.note(f"sample() {ms:.3f} ms a step", ms_per_step=ms)

    rows.check("a step of the sampler", body)
    rows.check("sample()", whole)
