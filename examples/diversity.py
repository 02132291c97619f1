"""Diversity training: move away from a frozen reference without losing the task, from a warm start.

    python examples/diversity.py [--first 600] [--steps 300] [--mode eager] [--json diversity.json]

A diffusion transformer is trained on real digits with SF-NorMuon and saved. Then every arm trains on

    loss = flow_loss(model) - weight · mean((model - reference)²)

against the frozen copy of that model. At ``weight`` above 1 nothing bounds the second term from below. FusionOpt
reports three arms of this experiment on an audio model (AdamW, SF-NorMuon, and the full recipe warm-started from
SF-NorMuon); these are the same three, fresh and warm, and the table shows what came out. A warm arm takes weights, z
and momenta from the checkpoint (``TrainingStep.warm_start``).
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import read_digits, real_digits
from dit import DiT
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile.optim import Transform


@dataclass(frozen=True)
class Size:
    """`first`: steps of the training that makes the reference; `steps`: of each arm."""

    depth: int = 4
    batch: int = 64
    first: int = 600
    steps: int = 300
    per_digit: int = 10


@dataclass(frozen=True)
class Outcome:
    """Of one arm. `task`: flow loss on held-out digits; `distance`: mean square from the reference's velocity;
    `right`: share of samples in which a nearest-neighbour classifier sees the digit asked for; `skipped`: steps whose
    gradient was not finite; `ended`: steps until the weights gave no finite loss (None: they always did)."""

    task: float
    distance: float
    right: float
    skipped: int
    ended: int | None


ARMS: dict[str, tuple[Callable[[], Transform], bool]] = {
    "AdamW, fresh": (lambda: fc.optim.adamw(1e-3), False),
    "AdamW, warm": (lambda: fc.optim.adamw(1e-3), True),
    "SF-NorMuon, fresh": (lambda: fc.optim.sf_normuon(8e-3), False),
    "SF-NorMuon, warm": (lambda: fc.optim.sf_normuon(8e-3), True),
    "full fusion, warm": (lambda: fc.optim.full_fusion(8e-3), True),
}


def interpolate(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    s = t[:, None, None, None]
    return (1 - s) * x + s * noise


def flow_loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    t, noise = torch.rand(len(x), device=x.device), torch.randn_like(x)
    return F.mse_loss(model(interpolate(x, t, noise), t, y), noise - x)


def diverse_loss(reference: nn.Module, weight: float) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The task minus `weight` times the squared distance from `reference`, and both as metrics."""

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        t, noise = torch.rand(len(x), device=x.device), torch.randn_like(x)
        at = interpolate(x, t, noise)
        velocity = model(at, t, y)
        with torch.no_grad():
            known = reference(at, t, y)
        task, distance = F.mse_loss(velocity, noise - x), F.mse_loss(velocity, known)
        return task - weight * distance, {"task": task.detach(), "distance": distance.detach()}

    return loss_fn


def batches(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    while True:
        for at in torch.randperm(len(images), generator=draw).split(size):
            if len(at) == size:
                yield images[at], labels[at]


def outcome(step: fc.TrainingStep, reference: nn.Module, held: tuple[Tensor, Tensor], size: Size) -> Outcome:
    """Judged at the deployable weights, over times and noise that are the same for every arm."""
    model, (x, y) = copy.deepcopy(step.model).eval(), held
    draw = torch.Generator().manual_seed(1)
    t, noise = torch.rand(len(x), generator=draw), torch.randn(x.shape, generator=draw)
    with torch.no_grad():
        at = interpolate(x, t, noise)
        velocity, known = model(at, t, y), reference(at, t, y)
        asked = torch.arange(10).repeat_interleave(size.per_digit)
        images = torch.randn(len(asked), 1, 8, 8, generator=draw)
        for i in range(40):
            now = torch.full((len(asked),), 1 - i / 40)
            images = images - model(images, now, asked) / 40
    finite = bool(torch.isfinite(images).all())
    right = float((torch.from_numpy(read_digits(images)) == asked).float().mean()) if finite else 0.0
    return Outcome(
        float(F.mse_loss(velocity, noise - x)),
        float(F.mse_loss(velocity, known)),
        right,
        int(step.metrics["skipped"]),
        None,
    )


def run_arm(
    make: Callable[[], Transform],
    warm: Path | None,
    reference: nn.Module,
    weight: float,
    data: tuple[Tensor, Tensor],
    held: tuple[Tensor, Tensor],
    size: Size,
    mode: str | None,
) -> Outcome:
    torch.manual_seed(2)
    step = fc.compile_training_step(
        DiT(hidden_size=128, depth=size.depth), diverse_loss(reference, weight), optimizer=make(), mode=mode
    )
    if warm is not None:
        step.warm_start(warm)
    ended, feed = None, batches(*data, size.batch)
    for i in range(size.steps):
        loss = step(*next(feed))
        if ended is None and i % 10 == 9 and not bool(torch.isfinite(loss)):
            ended = i + 1
    found = asdict(outcome(step, reference, held, size))
    return Outcome(**{**found, "ended": ended})


def run(size: Size, weight: float, console: Console, mode: str | None = None) -> dict[str, Outcome]:
    """Make the reference, run every arm, and give what each came to; "reference" is the first row."""
    torch.manual_seed(0)
    images, labels = real_digits(torch.device("cpu"))
    order = torch.randperm(len(images))
    held, kept = (images[order[:360]], labels[order[:360]]), (images[order[360:]], labels[order[360:]])
    first = fc.compile_training_step(DiT(hidden_size=128, depth=size.depth), flow_loss, mode=mode)
    feed = batches(*kept, size.batch)
    for _ in range(size.first):
        first(*next(feed))
    reference = copy.deepcopy(first.model).eval().requires_grad_(False)
    outcomes = {"the reference": outcome(first, reference, held, size)}
    with tempfile.TemporaryDirectory() as folder:
        first.save(folder)
        for name, (make, warm) in ARMS.items():
            source = Path(folder) if warm else None
            outcomes[name] = run_arm(make, source, reference, weight, kept, held, size, mode)
            console.print(f"{name}: {outcomes[name]}", highlight=False)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=Size.first, help="steps that make the reference")
    parser.add_argument("--steps", type=int, default=Size.steps, help="of each arm")
    parser.add_argument("--mode", help="torch.compile's, or eager: the same steps, uncompiled")
    parser.add_argument("--weight", type=float, default=1.05, help="of the distance; above 1 nothing bounds it")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console()
    outcomes = run(Size(first=options.first, steps=options.steps), options.weight, console, options.mode)
    table = Table("arm", "held-out flow loss", "distance", "digits right", "skipped", "not finite from")
    for name, o in outcomes.items():
        ended = "-" if o.ended is None else f"step {o.ended}"
        table.add_row(name, f"{o.task:.4g}", f"{o.distance:.4g}", f"{o.right:.0%}", str(o.skipped), ended)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps({name: asdict(o) for name, o in outcomes.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
