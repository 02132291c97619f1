"""Values of the schedules at their corners, their floors, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fusion_compile import compile_training_step, optim
from fusion_compile.optim._schedules import Schedule, cosine, linear, wsd
from tests.data.bowl import Bowl, loss_fn, noise


def fusionopt(kind: str, step: int, total: int, warmup: int, decay_min: float, start: float = 0.8) -> float:
    """FusionOpt's warm-up times its `decay_factor`, restated from its equations."""
    warm = (step + 1) / warmup if step < warmup else 1.0
    if step < warmup:
        return warm
    done = min(1.0, (step - warmup) / (total - warmup))
    of_all = min(1.0, step / total)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": 1.0 if of_all < start else 1 - (of_all - start) / (1 - start),
    }[kind]
    return warm * (decay_min + (1 - decay_min) * max(0.0, shape))


@pytest.mark.parametrize("kind", [cosine, linear, wsd])
@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("floor", [0.0, 0.1, 1.0])
def test_a_decaying_schedule_is_fusionopts_with_final_for_its_floor(kind: Any, warmup: int, floor: float) -> None:
    schedule = kind(3e-4, 120, warmup, final=floor * 3e-4)
    for step in range(200):
        wanted = 3e-4 * fusionopt(kind.__name__, step, 120, warmup, floor)
        assert schedule(step) == pytest.approx(wanted, rel=1e-9, abs=1e-18), step


def test_wsd_at_its_corners() -> None:
    schedule = wsd(2.0, total_steps=100, warmup_steps=4, decay_fraction=0.25, final=1.0)
    values = {0: 0.5, 3: 2.0, 4: 2.0, 75: 2.0, 80: 1.8, 99: 1.04, 100: 1.0, 10**6: 1.0}
    assert {step: schedule(step) for step in values} == pytest.approx(values, rel=1e-12)
    straight = linear(2.0, 50)
    assert [wsd(2.0, 50, decay_fraction=1.0)(step) for step in range(60)] == pytest.approx(
        [straight(step) for step in range(60)], abs=1e-15
    )
    assert isinstance(schedule, Schedule)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"total_steps": 10, "warmup_steps": -1}, "warmup_steps=-1 is negative"),
        ({"total_steps": 10, "warmup_steps": 10}, "total_steps=10 must be larger than warmup_steps=10"),
        ({"total_steps": 10, "decay_fraction": 0.0}, "decay_fraction=0.0 is not a share"),
        ({"total_steps": 10, "decay_fraction": 1.5}, "decay_fraction=1.5 is not a share"),
        ({"total_steps": 10, "warmup_steps": 9}, "warmup_steps=9 reaches into the decay, the last 0.2 of 10 steps"),
    ],
)
def test_a_wsd_without_room_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wsd(1.0, **arguments)


def test_wsd_prints_compares_and_travels_in_a_checkpoint() -> None:
    schedule = wsd(1e-3, total_steps=20, warmup_steps=2)
    assert schedule == wsd(1e-3, 20, 2, 0.2, 0.0) != wsd(1e-3, 20, 2, 0.3)
    assert (
        repr(schedule)
        == "wsd(peak=0.001, total_steps=20, warmup_steps=2, decay_fraction=0.2, final=0.0, tail='linear')"
    )
    step = compile_training_step(Bowl(), loss_fn, optimizer="adamw", lr=schedule, mode="eager")
    step(*noise(0))
    other = compile_training_step(Bowl(), loss_fn, optimizer="adamw", mode="eager")
    other.load_state_dict(step.state_dict())
    assert other.hyperparameters["lr"] == schedule
    other(*noise(1))
    assert float(other.metrics["lr"]) == pytest.approx(1e-3, rel=1e-6)
    assert optim.Schedule is Schedule


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (optim.constant(2.0), {0: 2.0, 10**6: 2.0}),
        (optim.constant(2.0, warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0}),
        (optim.linear(2.0, 12, 4, final=1.0), {0: 0.5, 3: 2.0, 4: 2.0, 8: 1.5, 12: 1.0, 99: 1.0}),
        (optim.linear(2.0, 4), {0: 2.0, 1: 1.5, 4: 0.0}),
        (optim.cosine(2.0, 12, 4, final=1.0), {0: 0.5, 3: 2.0, 4: 2.0, 8: 1.5, 12: 1.0, 99: 1.0}),
        (optim.cosine(2.0, 12), {0: 2.0, 4: 1.5, 8: 0.5, 12: 0.0}),
    ],
)
def test_schedule_values_at_warm_up_middle_and_end(schedule: optim.Schedule, values: dict[int, float]) -> None:
    found = np.array([schedule(step) for step in values])
    np.testing.assert_allclose(found, list(values.values()), rtol=0, atol=1e-12)  # cos in float64
    assert isinstance(schedule, optim.Schedule)


@pytest.mark.parametrize("kind", [optim.cosine, optim.linear])
def test_a_schedule_without_room_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1 is negative"):
        kind(1.0, 10, -1)
    with pytest.raises(ValueError, match="total_steps=10 must be larger than warmup_steps=10"):
        kind(1.0, 10, 10)
    with pytest.raises(ValueError, match="warmup_steps=-1 is negative"):
        optim.constant(1.0, -1)


@pytest.mark.parametrize(
    "make",
    [
        lambda wrong: optim.constant(wrong),
        lambda wrong: optim.constant(1.0, warmup_steps=wrong),
        lambda wrong: optim.cosine(wrong, 10),
        lambda wrong: optim.cosine(1.0, wrong),
        lambda wrong: optim.linear(1.0, 10, final=wrong),
        lambda wrong: optim.wsd(wrong, 10),
        lambda wrong: optim.wsd(1.0, 10, decay_fraction=wrong),
    ],
)
def test_what_is_no_number_is_refused(make: Callable[[Any], Any]) -> None:
    for wrong in ("1", True, [1]):
        with pytest.raises(TypeError, match=r"=.* is a (str|bool|list); give a number\.$"):
            make(wrong)


def test_rex_and_the_tails_of_wsd() -> None:
    assert [optim.rex(2.0, 5, 1, alpha=2.0)(step) for step in (0, 1, 3, 5, 9)] == [2.0, 2.0, 0.5, 0.0, 0.0]
    assert [optim.rex(1.0, 4)(s) for s in range(6)] == [optim.linear(1.0, 4)(s) for s in range(6)]
    for tail, middle in (("linear", 0.5), ("cosine", 0.5), ("sqrt", 1 - 0.5**0.5)):
        schedule = optim.wsd(1.0, 20, 2, decay_fraction=0.5, tail=tail)
        assert schedule(9) == 1.0 and schedule(15) == pytest.approx(middle) and schedule(20) == schedule(30) == 0.0
    with pytest.raises(ValueError, match="tail='square' is not known"):
        optim.wsd(1.0, 10, tail="square")
    with pytest.raises(ValueError, match=r"alpha=0.0 is not a positive exponent"):
        optim.rex(1.0, 10, alpha=0.0)
