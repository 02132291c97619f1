"""A control battery: recipes side by side on small real tasks, with the noise floor beside every gap.

    python benchmarks/battery.py [--quick] [--only NAME ...]

Tasks, on scikit-learn's digits (1,797 pictures of 8 × 8, split 1,200 / 597): a network from scratch, and adapters of
rank 4 on a frozen one that was trained on digits 0 to 4. Each recipe gets the same budget of learning rates, tuned on
seeds that are not reported; then fresh seeds, the same batches for all. Reported: mean loss on unseen pictures at a
rate that falls to zero, the gap to the loss on seen ones, both at a constant rate, and two standard errors of the
difference to the first row (pairs of seeds). `adakaon` and `nekaon` with k = 0 are equal bit for bit: rows of theirs
that differ are a fault of this program. A new optimizer is one line of `RECIPES`. ``--quick`` takes 15 seconds and
tunes nothing, so it ranks nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import Transform

Make = Callable[[optim.Schedule | float], Transform]
SEEN = 1200


class Recipe(NamedTuple):
    """`middle`: the middle of its learning rates, which are multiples of it."""

    make: Make
    middle: float


RECIPES: dict[str, Recipe] = {
    "adamw": Recipe(lambda lr: optim.adamw(lr), 3e-3),
    "lion": Recipe(lambda lr: optim.lion(lr), 3e-4),
    "adakaon": Recipe(lambda lr: optim.adakaon(lr, (0.5, 0.999)), 3e-3),
    "nekaon k = 0 (a twin)": Recipe(lambda lr: optim.nekaon(lr, (0.5, 0.999), 0.0, k=0, momentum="bf16"), 3e-3),
    "nekaon": Recipe(lambda lr: optim.nekaon(lr), 3e-3),
    "adapnm": Recipe(lambda lr: optim.adapnm(lr), 3e-3),
    "adamuon": Recipe(lambda lr: optim.adamuon(lr), 1e-2),
    "adopt": Recipe(lambda lr: optim.adopt(lr), 3e-3),
    "prodigy": Recipe(lambda lr: optim.prodigy(lr), 1.0),
    "adafactor": Recipe(lambda lr: optim.adafactor(lr), 3e-2),
}


class Adapter(nn.Module):
    """A frozen layer and a correction of rank 4."""

    def __init__(self, frozen: nn.Linear) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, frozen.in_features) / frozen.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(frozen.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.frozen(x) + F.linear(F.linear(x, self.down), self.up)
        return out


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 10)
    )


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def digits() -> tuple[Tensor, Tensor]:
    """All pictures, [1797, 64] in 0 to 1, and their labels, in an order that is always the same."""
    pictures, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.tensor(pictures, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]


def adapters(x: Tensor, y: Tensor) -> nn.Sequential:
    """Adapters on a network that knows the digits 0 to 4."""
    base, known = network(), (y[:SEEN] < 5).nonzero().flatten()
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for i in range(60):
        at = known[torch.arange(64 * i, 64 * i + 64) % len(known)]
        optimizer.zero_grad()
        loss_fn(base, x[at], y[at]).backward()
        optimizer.step()
    return nn.Sequential(*(Adapter(m) if isinstance(m, nn.Linear) else m.requires_grad_(False) for m in base))


class Outcome(NamedTuple):
    """Loss on unseen pictures, and how far it lies above that on seen ones."""

    unseen: float
    gap: float


def run(task: str, recipe: Recipe, factor: float, seed: int, steps: int, *, falls: bool) -> Outcome:
    """Train once."""
    x, y = digits()
    torch.manual_seed(seed)
    model = network() if task == "scratch" else adapters(x, y)
    peak = factor * recipe.middle
    rate = optim.linear(peak, steps) if falls else peak
    step = fc.compile_training_step(model, loss_fn, optimizer=recipe.make(rate), mode="eager", rehearse=False)
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(0, SEEN, (64,), generator=source)
        step(x[at], y[at])
    with torch.no_grad():
        seen, unseen = loss_fn(model, x[:SEEN], y[:SEEN]), loss_fn(model, x[SEEN:], y[SEEN:])
    return Outcome(float(unseen), float(unseen - seen))


def tuned(task: str, recipe: Recipe, factors: Sequence[float], seeds: Sequence[int], steps: int) -> float:
    """The factor with the lowest mean loss on unseen pictures over `seeds`, which are not reported."""

    def mean(factor: float) -> float:
        found = [run(task, recipe, factor, seed, steps, falls=True).unseen for seed in seeds]
        return statistics.mean(v if v == v else float("inf") for v in found)

    return min(factors, key=mean)


def noise_of(first: Sequence[float], other: Sequence[float]) -> float:
    """Two standard errors of the mean difference of pairs."""
    differences = [b - a for a, b in zip(first, other, strict=True)]
    return 2 * statistics.stdev(differences) / len(differences) ** 0.5


def main() -> None:
    """Run all, and print a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and seeds: whether it runs, not what is better")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    asked = parser.parse_args()
    steps, fresh, factors = (40, 2, (1.0,)) if asked.quick else (300, 8, (0.1, 0.3, 1.0, 3.0, 10.0))
    tuning = [100] if asked.quick else [100, 101]
    torch.set_num_threads(1)
    for task in ("scratch", "adapters"):
        print(f"\n{task}: {steps} steps, {fresh} seeds, {len(factors)} rates each, tuned on seeds {tuning}\n")
        print("| recipe | rate | unseen | ± against the first | gap | unseen, constant rate | gap, constant rate |")
        print("|---|---|---|---|---|---|---|")
        first: list[float] = []
        for name in asked.only:
            recipe = RECIPES[name]
            factor = tuned(task, recipe, factors, tuning, steps) if len(factors) > 1 else factors[0]
            falling, constant = (
                [run(task, recipe, factor, seed, steps, falls=falls) for seed in range(fresh)]
                for falls in (True, False)
            )
            unseen = [outcome.unseen for outcome in falling]
            first = first or unseen
            cells = [statistics.mean(unseen), noise_of(first, unseen), statistics.mean(o.gap for o in falling)]
            cells += [statistics.mean(o.unseen for o in constant), statistics.mean(o.gap for o in constant)]
            print(f"| {name} | {factor * recipe.middle:.2g} | {' | '.join(f'{c:.4f}' for c in cells)} |", flush=True)


if __name__ == "__main__":
    main()
