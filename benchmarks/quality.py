"""What each recipe reaches, at the same number of steps and in the same time, each at its own tuned learning rate.

    python benchmarks/quality.py --problem digits [--json docs/benchmarks/quality-digits.json]
    python benchmarks/quality.py --table docs/benchmarks/quality-*.json

The measure is the rectified-flow loss on held-out images, at the deployable weights, over times and noise that are the
same for everybody. Each contender gets four runs of one seed and half the steps to find its learning rate: the same
three multiples of its customary one, then beyond the best where that lies at the edge, or between the two best; the
winner goes on to three other seeds at full length. "Same time" gives a slower contender as many fewer steps
(its schedule shortened with them) as its step takes longer than AdamW's, measured in this process, by turns. AdamW,
Muon and Muon+MONA follow a cosine to zero; Schedule-Free ones need no schedule, and all warm up alike. Contenders run
one after another, written to the JSON file as they finish; a run that was broken off goes on with those that are
missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from _measure import interleaved, machine, print_machine, print_table, write_json
from dit import DiT

from fusion_compile import TrainingStep, compile_training_step, optim
from fusion_compile.optim import Schedule, Transform

MULTIPLES = (0.4, 1.0, 2.5)
SEEDS = (1, 2, 3)
TUNING_SEED = 0
WARMUP = 0.05
TUNING_SHARE = 0.5
"""Of the steps, for a run that only compares learning rates."""
DRAWS = 4


@dataclass(frozen=True)
class Contender:
    """`make(lr)` builds the recipe; `lr`: its customary learning rate on these models; `scheduled`: needs a decay."""

    make: Callable[[float], Transform]
    lr: float
    scheduled: bool
    rates: tuple[str, ...] = ("lr",)


CONTENDERS: dict[str, Contender] = {
    "AdamW": Contender(lambda lr: optim.adamw(lr, betas=(0.9, 0.95), weight_decay=0.01), 4e-3, True),
    "Muon": Contender(
        lambda lr: optim.muon(lr, weight_decay=0.01, scale="match_rms_adamw", scalar_lr=lr),
        1e-2,
        True,
        ("lr", "scalar_lr"),
    ),
    "Muon + MONA": Contender(lambda lr: optim.fusion({"ns5", "mona"}, lr, weight_decay=0.01), 1e-2, True),
    "SF-NorMuon": Contender(lambda lr: optim.sf_normuon(lr, weight_decay=0.05), 1.6e-2, False),
    "full fusion": Contender(lambda lr: optim.full_fusion(lr, weight_decay=0.05), 1.6e-2, False),
}


@dataclass(frozen=True)
class Problem:
    """Images ``[N, C, H, W]`` with labels, the model over them, and how long one run is."""

    model: Callable[[], nn.Module]
    data: Callable[[], tuple[Tensor, Tensor]]
    batch: int
    steps: int


def digits() -> tuple[Tensor, Tensor]:
    from digits import real_digits

    return real_digits(torch.device("cpu"))


def photographs() -> tuple[Tensor, Tensor]:
    """4,096 crops of 16×16 from scikit-learn's two photographs, at half size; the label is the photograph."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    crops, labels = [], []
    for label, photograph in enumerate(load_sample_images().images):
        image = torch.tensor(photograph, dtype=torch.float32).permute(2, 0, 1) / 127.5 - 1
        image = F.avg_pool2d(image, 2)
        for _ in range(2048):
            top, left = draw.integers(0, image.shape[1] - 16), draw.integers(0, image.shape[2] - 16)
            crops.append(image[:, top : top + 16, left : left + 16])
            labels.append(label)
    return torch.stack(crops), torch.tensor(labels)


PROBLEMS = {
    "digits": Problem(lambda: DiT(8, 2, 1, 128, 4, 4), digits, 64, 300),
    "photographs": Problem(lambda: DiT(16, 4, 3, 256, 6, 4, num_classes=2), photographs, 32, 70),
}


def flow_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, e = torch.rand(len(x)), torch.randn_like(x)
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y), e - x)


class Course:
    """One contender on one problem: a step compiled once, and runs from fresh weights at any learning rate and seed."""

    def __init__(self, problem: Problem, contender: Contender) -> None:
        self.problem, self.contender = problem, contender
        images, labels = problem.data()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        held, kept = order[: len(order) // 5], order[len(order) // 5 :]
        self.train, self.held_out = (images[kept], labels[kept]), (images[held], labels[held])
        draw = torch.Generator().manual_seed(1)
        self.times = [torch.rand(len(held), generator=draw) for _ in range(DRAWS)]
        self.noises = [torch.randn(self.held_out[0].shape, generator=draw) for _ in range(DRAWS)]
        self.step = self._step()

    def _step(self) -> TrainingStep:
        torch.manual_seed(0)
        optimizer = self.contender.make(self.contender.lr)
        return compile_training_step(self.problem.model(), flow_loss, optimizer=optimizer, clip_grad_norm=1.0)

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(seed)
        images, labels = self.train
        while True:
            for at in torch.randperm(len(images), generator=draw).split(self.problem.batch):
                if len(at) == self.problem.batch:
                    yield images[at], labels[at]

    def run(self, lr: float, seed: int, steps: int) -> float:
        """The held-out loss after `steps` from the weights of `seed`; inf where it is not finite."""
        torch.manual_seed(seed)
        fresh = self.problem.model()
        self.step.warm_start({"model": fresh.state_dict(), "optimizer": {}})
        self.step.steps_called = 0
        warmup = round(WARMUP * steps)
        schedule: Schedule = optim.constant(lr, warmup)
        if self.contender.scheduled:
            schedule = optim.cosine(lr, total_steps=steps, warmup_steps=warmup)
        for rate in self.contender.rates:
            self.step.hyperparameters[rate] = schedule
        batches = self.batches(seed)
        for _ in range(steps):
            self.step(*next(batches))
        return self.loss_held_out()

    def loss_held_out(self) -> float:
        model, (images, labels) = self.step.model, self.held_out
        model.eval()
        total = 0.0
        with torch.no_grad():
            for t, e in zip(self.times, self.noises, strict=True):
                s = t[:, None, None, None]
                total += float(F.mse_loss(model((1 - s) * images + s * e, t, labels), e - images))
        model.train()
        return total / DRAWS if total < float("inf") else float("inf")


def relative_times(courses: dict[str, Course], rounds: int) -> dict[str, float]:
    """Milliseconds of a step over AdamW's, all contenders by turns in one process."""
    feeds = {name: course.batches(0) for name, course in courses.items()}
    runs = {name: (lambda n=name: courses[n].step(*next(feeds[n]))) for name in courses}
    times = interleaved(runs, torch.device("cpu"), rounds=rounds, calls=5, warmup=3)
    return {name: statistics.median(a / b for a, b in zip(times[name], times["AdamW"], strict=True)) for name in times}


def next_rate(tuned: dict[float, float]) -> float:
    """Beyond the best rate, by the same factor, where it lies at the edge; else between the two best."""
    rates = sorted(tuned)
    best, second = sorted(rates, key=lambda lr: tuned[lr])[:2]
    if best == rates[0]:
        return best * best / rates[1]
    if best == rates[-1]:
        return best * best / rates[-2]
    return (best * second) ** 0.5


def study(course: Course, slowness: float) -> dict[str, Any]:
    """Tune, then run the seeds, at the same steps and in the same time."""
    problem, customary, started = course.problem, course.contender.lr, time.perf_counter()
    short = round(TUNING_SHARE * problem.steps)
    tuned = {m * customary: course.run(m * customary, TUNING_SEED, short) for m in MULTIPLES}
    fourth = next_rate(tuned)
    tuned[fourth] = course.run(fourth, TUNING_SEED, short)
    best = min(tuned, key=lambda lr: tuned[lr])
    same_steps = [course.run(best, seed, problem.steps) for seed in SEEDS]
    fewer = round(problem.steps / max(1.0, slowness))
    same_time = same_steps if fewer == problem.steps else [course.run(best, seed, fewer) for seed in SEEDS]
    return {
        "tuning": {f"{lr:g}": loss for lr, loss in tuned.items()},
        "lr": best,
        "steps": problem.steps,
        "same steps": same_steps,
        "steps in the same time": fewer,
        "same time": same_time,
        "ms over AdamW's": slowness,
        "seconds of the study": time.perf_counter() - started,
    }


def spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def show(path: Path) -> None:
    """The table of one JSON file."""
    stored = json.loads(path.read_text())
    rows = []
    for name, r in stored["contenders"].items():
        edge = "" if r["lr"] not in (min(map(float, r["tuning"])), max(map(float, r["tuning"]))) else " (edge)"
        slower = r["ms over AdamW's"]
        cells = (f"{r['lr']:g}{edge}", spread(r["same steps"]), spread(r["same time"]))
        rows.append((name, *cells, str(r["steps in the same time"]), f"{slower:.2f}"))
    head = ("", "best lr", f"held-out loss, {stored['steps']} steps", "in AdamW's time", "steps there", "ms a step")
    print_table(f"{stored['problem']} ({stored['parameters'] / 1e6:.2f} M parameters)", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=tuple(PROBLEMS), default="digits")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="instead of the problem's own")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the tables of these files")
    options = parser.parse_args()
    if options.table:
        for path in options.table:
            show(path)
        return
    problem = PROBLEMS[options.problem]
    if options.steps:
        problem = Problem(problem.model, problem.data, problem.batch, options.steps)
    path = options.json or Path(f"quality-{options.problem}.json")
    facts = machine(torch.device("cpu"))
    print_machine(facts)
    stored: dict[str, Any] = {"contenders": {}}
    if path.exists():
        stored = json.loads(path.read_text())
    stored |= {
        "machine": facts,
        "problem": options.problem,
        "steps": problem.steps,
        "batch": problem.batch,
        "seeds": SEEDS,
        "parameters": sum(p.numel() for p in problem.model().parameters()),
    }
    courses = {name: Course(problem, c) for name, c in CONTENDERS.items()}
    if "slowness" not in stored:
        stored["slowness"] = relative_times(courses, options.rounds)
        write_json(path, stored)
    for name in CONTENDERS:
        if name not in stored["contenders"]:
            stored["contenders"][name] = study(courses[name], stored["slowness"][name])
            write_json(path, stored)
            print(name, json.dumps(stored["contenders"][name]), flush=True)
    show(path)


if __name__ == "__main__":
    main()
