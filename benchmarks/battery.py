"""A control battery: all recipes side by side on small real tasks, with the noise floor beside every number.

    python benchmarks/battery.py [--quick] [--tasks NAME ...] [--only NAME ...] [--json docs/benchmarks/battery.json]
    python benchmarks/battery.py --table docs/benchmarks/battery.json

Every recipe gets the same budget: five rates, each for half of the steps on two seeds that are not reported; then eight
fresh seeds at the best, the same starts and batches for all, once with a rate that falls to zero and once with a
constant one. Reported are means: the loss on unseen pictures, how far it lies above that on seen ones (the gap), and
the step at which it is as low as the first row's is half way. Beside each stands its noise floor, two standard errors
of the difference to the first row over pairs of seeds: what is smaller says nothing.

Three rows are controls. ``nekaon k = 0`` is `adakaon` bit for bit, or this program fails. torch's AdamW is the first
row in another order of operations: what it differs by is rounding. The first row on eight other seeds shows what other
starts and batches do, with the two standard errors of two independent means.

Recipes are written to the JSON file as they finish, and a run that was broken off goes on with those that are missing;
``--table`` writes docs/results.md from it. ``--quick`` takes two minutes, two seeds and no tuning: it shows that all
run, and ranks nothing. A new optimizer is one line of `RECIPES`.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _battery_page import write_page
from _battery_tasks import TASKS, Task, Tensors
from _measure import compare, interleaved, machine, write_json
from torch import nn
from update import ours

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import Schedule, Transform

Make = Callable[[Schedule | float], Transform]
FIRST = "adamw"
AGAIN, TWIN, TORCHS = "adamw, other seeds", "nekaon k = 0", "torch.optim.AdamW"
CONTROLS = {AGAIN: FIRST, TWIN: "adakaon", TORCHS: FIRST}
LOOKS = 10
"""How often in a run the loss on unseen pictures is taken."""


class Recipe(NamedTuple):
    """`make`: of a rate. `middle`: the middle of its rates, which are multiples of it. `falls`: whether it wants a rate
    that falls to zero; else both of its runs are at a constant one."""

    make: Make
    middle: float
    falls: bool = True


_of = functools.partial
RECIPES: dict[str, Recipe] = {
    FIRST: Recipe(optim.adamw, 3e-3),
    TORCHS: Recipe(optim.adamw, 3e-3),
    AGAIN: Recipe(optim.adamw, 3e-3),
    "adakaon": Recipe(_of(optim.adakaon, betas=(0.5, 0.999)), 3e-3),
    TWIN: Recipe(_of(optim.nekaon, betas=(0.5, 0.999), weight_decay=0.0, k=0, momentum="bf16"), 3e-3),
    "nekaon": Recipe(optim.nekaon, 3e-3),
    "adapnm": Recipe(optim.adapnm, 3e-3),
    "adamuon": Recipe(optim.adamuon, 1e-2),
    "adamuon_sign": Recipe(lambda lr: optim.adamuon_sign(lr, scalar_lr=lr), 3e-3),
    "lion": Recipe(optim.lion, 3e-4),
    "lion 4bit": Recipe(_of(optim.lion, momentum="4bit"), 3e-4),
    "adamw int8": Recipe(_of(optim.adamw, momentum="int8", second_moment="int8"), 3e-3),
    "adopt": Recipe(optim.adopt, 3e-3),
    "adabelief": Recipe(optim.adabelief, 3e-3),
    "adamp": Recipe(optim.adamp, 3e-3),
    "adafactor": Recipe(optim.adafactor, 3e-2),
    "prodigy": Recipe(optim.prodigy, 1.0),
    "autokaon": Recipe(optim.autokaon, 1.0),
    "sf_adamw": Recipe(optim.sf_adamw, 1e-2, falls=False),
    "kempner_sf_adamw": Recipe(optim.kempner_sf_adamw, 1e-2, falls=False),
    "sf_normuon": Recipe(optim.sf_normuon, 1e-2, falls=False),
    "muon": Recipe(lambda lr: optim.muon(lr, scale="match_rms_adamw", scalar_lr=lr), 3e-3),
    "kempner_muon": Recipe(optim.kempner_muon, 2e-2),
    "normuon": Recipe(lambda lr: optim.normuon(lr, scale="match_rms", scalar_lr=lr), 3e-3),
    "soap": Recipe(optim.soap, 3e-3),
    "full_fusion": Recipe(optim.full_fusion, 1e-2, falls=False),
}


class Budget(NamedTuple):
    """`factors`: the rates over a recipe's middle one. `tuning`: the seeds on which one is chosen. `fresh`: those that
    are reported. `share`: of a task's steps."""

    factors: tuple[float, ...]
    tuning: tuple[int, ...]
    fresh: tuple[int, ...]
    share: float


FULL = Budget((0.1, 0.3, 1.0, 3.0, 10.0), (100, 101), tuple(range(8)), 1.0)
QUICK = Budget((1.0,), (), (0, 1), 0.2)


class Outcome(NamedTuple):
    """`unseen`: the loss on unseen pictures; `gap`: how far it is above that on seen ones; `course`: the loss on unseen
    ones after each tenth of the steps. What is not finite is infinite."""

    unseen: float
    gap: float
    course: tuple[float, ...]


def _captured(task: Task, model: nn.Module, recipe: Recipe, rate: Schedule | float) -> Callable[[Tensors], object]:
    step = fc.compile_training_step(model, task.loss, optimizer=recipe.make(rate), mode="eager", rehearse=False)
    return lambda batch: step(*batch)


def _torchs(task: Task, model: nn.Module, rate: Schedule | float) -> Callable[[Tensors], object]:
    """torch's own AdamW, tensor by tensor, with the numbers of `adamw`."""
    numbers = optim.adamw().hyperparameters
    decay = numbers["weight_decay"]
    assert isinstance(decay, float)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), weight_decay=decay, foreach=False)
    taken = 0

    def step(batch: Tensors) -> None:
        nonlocal taken
        optimizer.param_groups[0]["lr"] = rate(taken) if callable(rate) else rate
        optimizer.zero_grad()
        task.loss(model, *batch).backward()
        optimizer.step()
        taken += 1

    return step


def run(task: Task, name: str, factor: float, seed: int, steps: int, *, falls: bool) -> Outcome:
    """Train once."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model, peak = task.model(), factor * recipe.middle
    rate = optim.linear(peak, steps) if falls and recipe.falls else peak
    step = _torchs(task, model, rate) if name == TORCHS else _captured(task, model, recipe, rate)
    batches, (seen, unseen) = task.batches(seed), task.split()
    looks, course = {round(steps * i / LOOKS) for i in range(1, LOOKS + 1)}, []
    for i in range(1, steps + 1):
        step(next(batches))
        if i in looks:
            course.append(_loss(task, model, unseen))
            if not math.isfinite(course[-1]):
                return Outcome(math.inf, math.inf, (*course, *[math.inf] * (LOOKS - len(course))))
    return Outcome(course[-1], course[-1] - _loss(task, model, seen), tuple(course))


def _loss(task: Task, model: nn.Module, pictures: Tensors) -> float:
    with torch.no_grad():
        found = float(task.loss(model, *pictures))
    return found if math.isfinite(found) else math.inf


def tuned(task: Task, name: str, budget: Budget, steps: int) -> dict[float, float]:
    """By factor, the mean loss on unseen pictures over the tuning seeds after half of the steps."""

    def mean(factor: float) -> float:
        found = [run(task, name, factor, seed, max(1, steps // 2), falls=True) for seed in budget.tuning]
        return statistics.mean(outcome.unseen for outcome in found) if found else 0.0

    return {factor: mean(factor) for factor in budget.factors}


def study(task: Task, name: str, budget: Budget) -> dict[str, Any]:
    """Tune, then run the fresh seeds."""
    steps = max(LOOKS, round(budget.share * task.steps))
    rates = tuned(task, name, budget, steps)
    factor = min(rates, key=lambda f: rates[f])
    seeds = [s + len(budget.fresh) for s in budget.fresh] if name == AGAIN else budget.fresh
    middle = RECIPES[name].middle
    found: dict[str, Any] = {"rate": factor * middle, "tuning": {f"{f * middle:g}": v for f, v in rates.items()}}
    for key, falls in (("falling", True), ("constant", False)):
        found[key] = [run(task, name, factor, seed, steps, falls=falls)._asdict() for seed in seeds]
    found["steps"], found["at the edge"] = steps, factor in (min(rates), max(rates)) and len(rates) > 1
    return found


def bytes_of_state(task: Task, make: Make, middle: float) -> float:
    """Bytes of the optimizer's state a trained parameter."""
    model = task.model()
    step = fc.compile_training_step(model, task.loss, optimizer=make(middle), mode="eager", rehearse=False)
    held = sum(t.nbytes for key, t in step._state.items() if key.split("/")[0] == "optimizer")
    return held / sum(p.numel() for p in model.parameters() if p.requires_grad)


def times_of_updates(task: Task, names: Sequence[str], rounds: int) -> dict[str, float]:
    """The compiled update of each recipe over the first's, on the task's parameters, by turns."""
    device = torch.device("cpu")
    shapes = [tuple(p.shape) for p in task.model().parameters() if p.requires_grad]
    found: dict[str, float] = {}
    reference = ours(shapes, RECIPES[FIRST].make(RECIPES[FIRST].middle), device)
    for name in names:  # two at a time: programs of all at once would take gigabytes
        other = ours(shapes, RECIPES[name].make(RECIPES[name].middle), device)
        times = interleaved({FIRST: reference, "other": other}, device, rounds=rounds, calls=3)
        found[name] = compare(times, FIRST)["other"].ratio
    return found


def refuse_unequal_twins(task: str, studies: Mapping[str, Any]) -> None:
    """RuntimeError if the twin that is equal bit for bit is not: then the battery itself is wrong."""
    if TWIN in studies and CONTROLS[TWIN] in studies:
        one, other = studies[TWIN], studies[CONTROLS[TWIN]]
        if any(one[key] != other[key] for key in ("rate", "falling", "constant")):
            raise RuntimeError(f"{task}: {TWIN} and {CONTROLS[TWIN]} differ, and must be equal bit for bit.")


def main() -> int:
    """Run what is asked, recipe by recipe, and print or write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and seeds: whether it runs, not what is better")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--json", type=Path, help="where to go on, and where to write what is found")
    parser.add_argument("--costs", action="store_true", help="measure bytes and times of updates, too")
    parser.add_argument("--table", type=Path, help="only write docs/results.md from this file")
    asked = parser.parse_args()
    if asked.table:
        write_page(json.loads(asked.table.read_text()), FIRST, CONTROLS)
        return 0
    torch.set_num_threads(1)
    budget = QUICK if asked.quick else FULL
    kept: dict[str, Any] = {"tasks": {}, "costs": {}}
    if asked.json and asked.json.exists():
        kept = json.loads(asked.json.read_text())
    kept |= {"machine": machine(torch.device("cpu")), "budget": budget._asdict()}
    for key in asked.tasks:
        task = TASKS[key]
        if not task.available:
            print(f"{key} is left out: its pictures are in {task.needs}, which is not installed.", flush=True)
            continue
        studies = kept["tasks"].setdefault(key, {"about": task.about, "recipes": {}})["recipes"]
        for name in asked.only:
            if name not in studies:
                studies[name] = json.loads(json.dumps(study(task, name, budget)))
                losses = [outcome["unseen"] for outcome in studies[name]["falling"]]
                print(f"{key}: {name}: {statistics.mean(losses):.4f} at {studies[name]['rate']:g}", flush=True)
                if asked.json:
                    write_json(asked.json, kept)
        refuse_unequal_twins(key, studies)
    if asked.costs:
        task = TASKS["photographs"]
        names = [n for n in asked.only if n not in CONTROLS]
        times = times_of_updates(task, names, rounds=3 if asked.quick else 15)
        for name in names:
            recipe = RECIPES[name]
            kept["costs"][name] = {"bytes": bytes_of_state(task, recipe.make, recipe.middle), "time": times[name]}
        if asked.json:
            write_json(asked.json, kept)
    return 0


if __name__ == "__main__":
    sys.exit(main())
