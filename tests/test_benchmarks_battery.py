"""The control battery: its arithmetic against numbers by hand, its controls, and that all recipes are in it."""

from __future__ import annotations

import importlib
import math
import statistics
from types import ModuleType
from typing import Any

import pytest
import torch

from fusion_compile.optim._registry import factory_of, names
from tests.house.source import ROOT


@pytest.fixture
def battery(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("battery")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("_battery_page")


def test_the_noise_floor_is_two_standard_errors_of_the_difference(page: Any) -> None:
    first, other = [1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 3.5, 4.0]
    assert page.noise_of(first, other) == pytest.approx(2 * statistics.stdev([0.5, 0.0, 0.5, 0.0]) / 2)
    apart = 2 * math.sqrt((statistics.variance(first) + statistics.variance(other)) / 4)
    assert page.noise_of(first, other, paired=False) == pytest.approx(apart)
    assert math.isnan(page.noise_of([1.0], [2.0])) and math.isnan(page.noise_of([1.0, 2.0], [1.0, math.inf]))


def test_the_step_of_a_loss_lies_between_two_looks(page: Any) -> None:
    """Looks after steps 10, 20 and 30: 1.0, 0.5 and 0.0."""
    assert page.step_at([1.0, 0.5, 0.0], 0.75, 30) == pytest.approx(15)
    assert page.step_at([1.0, 0.5, 0.0], 2.0, 30) == pytest.approx(10)
    assert page.step_at([math.inf, 0.5, 0.0], 0.5, 30) == pytest.approx(20)
    assert math.isnan(page.step_at([1.0, 0.5], 0.1, 20))


def test_the_controls_and_the_order_of_a_table(battery: Any, page: Any) -> None:
    """On a stand-in for a task: the first row first, then by loss, a floor beside each number but the first row's."""

    def study(losses: list[float]) -> dict[str, Any]:
        outcomes = [{"unseen": loss, "gap": 0.1, "course": [2 * loss, loss]} for loss in losses]
        return {"rate": 1e-3, "steps": 20, "at the edge": False, "falling": outcomes, "constant": outcomes}

    studies = {"worse": study([3.0, 4.0]), battery.FIRST: study([1.0, 2.0]), battery.AGAIN: study([1.0, 2.2])}
    head, _, *rows = page.table_of(studies, battery.FIRST, battery.CONTROLS)
    assert [row.split(" | ")[0] for row in rows] == ["| adamw", "| *adamw, other seeds* (control)", "| worse"]
    assert "step of a loss of 3.000" in head
    assert "±" not in rows[0] and rows[2].count("±") == 4 and "0 of 2 reach it" not in rows[2]
    assert "1.6000 ± 1.5620" in rows[1]  # 2 √((0.5 + 0.72) / 2), of independent means
    assert "3.5000 ± 0.0000" in rows[2]


def test_a_table_goes_between_its_markers_and_nowhere_else(page: Any) -> None:
    assert page.put_into(f"a {page.BEGIN} old {page.END} b", "new") == f"a {page.BEGIN}\n\nnew\n\n{page.END} b"
    with pytest.raises(ValueError, match="lacks the lines"):
        page.put_into("a page", "new")
    assert page.BEGIN in page.PAGE.read_text(encoding="utf-8")


def test_every_recipe_is_in_the_battery(battery: Any) -> None:
    """But those that are another's options: the battery has them as that."""
    elsewhere = {"fusion", "fusionopt_compat"}  # `full_fusion` is `fusion` with all of its components
    # Whoever registers a recipe (the example in `register`, which is run) does so for the whole process.
    made = {name: factory_of(name) for name in names()}
    ours = {name for name, f in made.items() if f and hasattr(importlib.import_module(f.__module__), f.__name__)}
    assert ours - elsewhere <= battery.RECIPES.keys()
    assert {"adamw", "sf_normuon", "prodigy", "adakaon"} <= ours


def test_a_twin_is_equal_bit_for_bit_and_a_difference_is_a_fault(battery: Any) -> None:
    task = battery.TASKS["adapters"]._replace(steps=10)
    budget = battery.Budget((1.0, 3.0), (100,), (0,), 1.0)
    studies = {name: battery.study(task, name, budget) for name in ("adakaon", battery.TWIN)}
    battery.refuse_unequal_twins("adapters", studies)
    assert studies["adakaon"]["falling"] != studies["adakaon"]["constant"]
    studies[battery.TWIN] |= {"rate": 1.0}
    with pytest.raises(RuntimeError, match="must be equal bit for bit"):
        battery.refuse_unequal_twins("adapters", studies)


def test_torchs_adamw_is_the_first_row_but_for_rounding(battery: Any) -> None:
    """Ten steps of fp32: 1e-4 of the loss is a hundred times its rounding, and a thousandth of what a step changes."""
    task = battery.TASKS["adapters"]
    losses = [battery.run(task, name, 1.0, 0, 10, falls=True).unseen for name in (battery.FIRST, battery.TORCHS)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.manual_seed(0)
    with torch.no_grad():
        start = float(task.loss(task.model(), *task.split()[1]))
    assert abs(start - losses[0]) > 1e-2


def test_tuning_seeds_are_not_reported(battery: Any) -> None:
    for budget in (battery.FULL, battery.QUICK):
        assert not {*budget.tuning} & {*budget.fresh, *(s + len(budget.fresh) for s in budget.fresh)}
    assert len(battery.FULL.fresh) >= 8
