"""Train a diffusion transformer on real digits as one program, sample it from a table, and prove that it learned.

    python examples/train_and_sample_digits.py        (make demo: the same, with everything installed first)

Under 5 minutes on two CPU cores, all compilation included. Writes samples.png, loss.png, report.txt and a checkpoint
into demo/ and prints one table. The last line is, with numbers near these,

    PASS: 190 of 200 generated images (95.0 %) are the digit asked for; 170 (85 %) were needed. 209 s in all.

and the exit code is 1 if it begins with FAIL. The ordinary loop, AdamW, is only timed, on 30 steps: nothing is sampled
from it, so it keeps no EMA. SF-NorMuon's weights are an average themselves; examples/digits.ipynb trains AdamW with an
EMA.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before the other imports, which the seconds in the last line are to count

# ruff: noqa: E402
import argparse
import copy
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TypeVar

os.environ.setdefault("FUSION_COMPILE_PROGRESS", "0")  # this program shows its own bars

import torch
import torch.nn.functional as F
from digits import NEIGHBOURS, draw_loss, draw_samples, read_digits, real_digits
from dit import DiT
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from side_by_side import Race, compiled, euler_loop, largest_differences, ordinary_step, seconds
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.sampler import Sampler

NEEDED = 0.85
T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How much work the demo is. `pairs`: training steps that the ordinary loop takes too, on the same batches."""

    depth: int = 4
    batch: int = 64
    steps: int = 800
    warmup_steps: int = 100
    pairs: int = 30
    sampler_steps: int = 40
    per_digit: int = 20
    rounds: int = 3


QUICK = Size(depth=1, batch=8, steps=6, warmup_steps=2, pairs=2, sampler_steps=3, per_digit=2, rounds=1)


def flow_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Rectified flow: the velocity from data to noise. Times and noise are drawn on the device, inside the program."""
    t = torch.rand(len(x), device=x.device)
    noise = torch.randn_like(x)
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * noise, t, y), noise - x)


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch, each in another order and without the last, incomplete batch."""
    while True:
        for index in torch.randperm(len(images), device=images.device).split(size):
            if len(index) == size:
                yield images[index], labels[index]


class Stages:
    """A bar for each stage of the work on a terminal; elsewhere a line when a stage ends."""

    def __init__(self, console: Console, device: torch.device) -> None:
        self._console, self._device = console, device
        self._progress = Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<36}"),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Stages:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def run(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Show that `work` is going on; its seconds and its result."""
        task = self._progress.add_task(what, total=None, note="")
        took, result = seconds(work, self._device)
        self._progress.update(task, total=1, completed=1)
        self._say(what, took)
        return took, result

    def _say(self, what: str, took: float, note: str = "") -> None:
        if not self._console.is_terminal:
            self._console.print(f"{what:<40}{took:7.1f} s  {note}")

    def count(self, what: str, total: int) -> Callable[[int, str], None]:
        """A bar that fills up: the function takes how many are done, and a note."""
        task = self._progress.add_task(what, total=total, note="")
        started = time.perf_counter()

        def show(done: int, note: str) -> None:
            self._progress.update(task, completed=done, note=note)
            if done == total:
                self._say(f"{what}, {total} steps", time.perf_counter() - started, note)

        return show


@dataclass(frozen=True)
class Trained:
    """Seconds and milliseconds are pairs: ours, the ordinary loop's. `mode`: the one that both run in."""

    mode: str
    compile_s: tuple[float, float]
    step_ms: tuple[float, float]
    losses: list[float]
    explanation: str


def train(model: DiT, size: Size, mode: str | None, checkpoint: Path, stages: Stages, device: torch.device) -> Trained:
    """Train `model` with the default optimizer, SF-NorMuon; the first steps side by side with the ordinary loop."""
    twin = copy.deepcopy(model)
    feed = batches(*real_digits(device), size.batch)
    first = next(feed)

    step = fc.compile_training_step(model, flow_loss, lr=fc.optim.constant(8e-3, size.warmup_steps), mode=mode)
    ordinary = ordinary_step(twin, flow_loss, step.mode)
    ours_s, loss = stages.run("compile the training step", lambda: step(*first))
    theirs_s, _ = stages.run("compile the ordinary loop", lambda: ordinary(*first))

    losses, race = [loss], Race[Tensor](device)
    show = stages.count("train", size.steps)
    for done in range(2, size.steps + 1):
        x, y = next(feed)
        if 2 < done <= 2 + size.pairs:  # the second step of each is one more warm-up
            loss, _ = race.round(lambda x=x, y=y: step(x, y), lambda x=x, y=y: ordinary(x, y))  # type: ignore[misc]
        else:
            loss = step(x, y)
            if done == 2:
                ordinary(x, y)
        losses.append(loss)  # on the device: nothing waits for it until it is shown
        if done % 50 == 0 or done == size.steps:
            show(done, f"loss {torch.stack(losses[-50:]).mean():.3f}")
    step.save(checkpoint)
    explanation = str(fc.explain(step))
    step.release()  # the model's weights were views into the step's banks; now they can be freed one by one
    return Trained(step.mode, (ours_s, theirs_s), race.milliseconds(), torch.stack(losses).tolist(), explanation)


@dataclass(frozen=True)
class Sampled:
    """Pairs are ours and the compiled model's. `differences`: from the model as it is and from the compiled one."""

    images: Tensor
    compile_s: tuple[float, float]
    step_ms: tuple[float, float]
    differences: tuple[float, float]
    released: int
    weights: int
    explanation: str


def sample(model: DiT, asked: Tensor, size: Size, mode: str, stages: Stages, device: torch.device) -> Sampled:
    """Images of the digits `asked` for, from a sampler that has dropped the weights of its conditioning."""
    noise = torch.randn(len(asked), 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
    first_t = torch.ones(len(asked), device=device)

    def build() -> Sampler:
        sampler = fc.optimize_sampler(
            model,
            size.sampler_steps,
            example_inputs=(noise, first_t, asked),
            roles={"x": "live", "t": "step", "y": "request"},
            mode=mode,
            byte_budget=128 << 20,  # a row for each of 200 images; by itself it would not be worth its memory here
        )
        sampler(noise, first_t, asked)
        return sampler

    ours_s, sampler = stages.run("compile the sampler", build)
    fast = compiled(model, mode)
    loop = euler_loop(fast, sampler.timesteps)
    with torch.no_grad():
        theirs_s, _ = stages.run("compile the model for comparison", lambda: fast(noise, first_t, asked))
    race = Race[Tensor](device)

    def compare() -> list[float]:
        for _ in range(size.rounds):
            race.round(lambda: sampler.sample(noise, asked), lambda: loop(noise, asked))
        return largest_differences(sampler, (model, fast), sampler.timesteps, noise, asked)

    _, differences = stages.run(f"sample {len(asked)} digits, both ways alternating", compare)
    weights = sum(p.nbytes for p in model.parameters())
    released = sampler.release_weights(to="drop")
    images = sampler.sample(noise, asked)  # from here on the model could not have done this
    return Sampled(
        images,
        (ours_s, theirs_s),
        race.milliseconds(size.sampler_steps),
        (differences[0], differences[1]),
        released,
        weights,
        str(sampler.report),
    )


def results(trained: Trained, sampled: Sampled) -> Table:
    """What was measured, ours beside the ordinary way."""
    caption = (
        "Same batches, same process, alternating; medians. Training: against torch.compile(model) and "
        "AdamW(fused=True). Sampling: against torch.compile(model) in the same Euler loop. Compiling includes the "
        "first call. Of each pair the ordinary one comes second and finds the kernels that both share in the cache: "
        "benchmarks/step.py compares the seconds fairly."
    )
    table = Table(caption=caption, caption_justify="left")
    table.add_column("")
    for heading in ("fusion_compile", "ordinary", "ratio"):
        table.add_column(heading, justify="right")

    def row(what: str, pair: tuple[float, float]) -> None:
        ours, theirs = pair
        table.add_row(what, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}")

    row("compile the training, s", trained.compile_s)
    row("compile the sampling, s", sampled.compile_s)
    row("training step, ms", trained.step_ms)
    row("sampling step, ms", sampled.step_ms)
    table.add_section()
    as_it_is, as_compiled = sampled.differences
    table.add_row("largest difference, model", f"{as_it_is:.1e}", "", "")
    table.add_row("largest difference, compiled model", f"{as_compiled:.1e}", "", "")
    table.add_row("bytes released before sampling", f"{sampled.released:,}", f"of {sampled.weights:,}", "")
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"training steps (default {Size.steps})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where the files go (default %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, … (default: cuda where there is one)")
    parser.add_argument("--mode", help="torch.compile's modes or 'eager' (default: that of fusion_compile)")
    parser.add_argument("--quick", action="store_true", help="a few steps, uncompiled, without judgement: a smoke test")
    options = parser.parse_args(arguments)

    size = QUICK if options.quick else Size()
    if options.steps is not None:
        if options.steps < size.pairs + 2:
            parser.error(f"--steps {options.steps}: the comparison alone takes {size.pairs + 2}.")
        size = replace(size, steps=options.steps)
    mode = options.mode or ("eager" if options.quick else None)
    device = torch.device(
        options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    )
    options.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = DiT(depth=size.depth).to(device)
    asked = torch.arange(10, device=device).repeat_interleave(size.per_digit)
    console = Console(highlight=False)
    with Stages(console, device) as stages:
        trained = train(model, size, mode, options.out / "checkpoint", stages, device)
        sampled = sample(model.eval(), asked, size, trained.mode, stages, device)

    seen = read_digits(sampled.images)
    right, needed = int((seen == asked.cpu().numpy()).sum()), math.ceil(NEEDED * len(asked))
    share = f"{right} of {len(asked)}"
    draw_samples(
        sampled.images,
        asked.cpu().numpy(),
        seen,
        f"{len(asked)} digits in {size.sampler_steps} steps; {NEIGHBOURS} nearest neighbours read {share} as asked, "
        f"the framed ones otherwise",
        options.out / "samples.png",
    )
    draw_loss(trained.losses, f"SF-NorMuon, batch {size.batch}, one program a step", options.out / "loss.png")
    table = results(trained, sampled)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    about = f"torch {torch.__version__}, {where}, mode {trained.mode!r}, {size.steps} steps of {size.batch} images"
    passed = right >= needed
    word = "NOT JUDGED" if options.quick else "PASS" if passed else "FAIL"
    verdict = (
        f"{word}: {share} generated images ({100 * right / len(asked):.1f} %) are the digit asked for; "
        f"{needed} ({100 * NEEDED:.0f} %) were needed. {time.perf_counter() - STARTED:.0f} s in all."
    )
    text = Console(file=StringIO(), width=100)
    text.print(table)
    parts = (about, text.file.getvalue(), verdict, trained.explanation, sampled.explanation)  # type: ignore[attr-defined]
    (options.out / "report.txt").write_text("\n\n".join(parts) + "\n", encoding="utf-8")

    console.print(table)
    console.print(about)
    console.print(f"written: {options.out}/ samples.png, loss.png, report.txt, checkpoint", markup=False)
    console.print(verdict, soft_wrap=True)
    return 0 if passed or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
