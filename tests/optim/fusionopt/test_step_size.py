"""FusionOpt's schedule, its ratio of loss to gradient and its distance, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fusion_compile.optim._fusionopt.banked_parameters import BankedParameters
from fusion_compile.optim._fusionopt.step_size import Autoscale, PolyakState, Shape, polyak_ratio

PARAMETERS = BankedParameters(None, None)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_a_warm_up_is_linear_and_ends_at_one() -> None:
    shape = Shape(4, None, None, 0.0, 0.8)
    assert [float(shape.warm(number(k))) for k in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert float(Shape(0, None, None, 0.0, 0.8).warm(number(0))) == 1.0
    assert float(shape.decayed(number(9))) == 1.0


@pytest.mark.parametrize(
    ("decay", "values"),
    [
        ("linear", {0: 1.0, 2: 1.0, 6: 0.6, 10: 0.2, 99: 0.2}),
        ("cosine", {2: 1.0, 6: 0.6, 10: 0.2, 4: 0.2 + 0.4 * (1 + math.sqrt(0.5))}),
        ("wsd", {0: 1.0, 5: 1.0, 7.5: 0.6, 10: 0.2, 99: 0.2}),
    ],
)
def test_a_decay_goes_from_one_to_its_minimum(decay: str, values: dict[float, float]) -> None:
    shape = Shape(2, decay, 10, 0.2, 0.5)
    assert [float(shape.decayed(number(k))) for k in values] == pytest.approx([*values.values()], rel=1e-14)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((-1, None, None), "warmup_steps=-1 is negative"),
        ((0, "step", 10), "decay_schedule='step' is not known"),
        ((0, "wsd", None), "needs the number of steps; got total_steps=None"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(options: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Shape(*(*options, 0.0, 0.8))


def test_the_ratio_is_loss_over_mean_absolute_gradient_within_its_clamp() -> None:
    grads, state = {"w": number(0) + torch.tensor([1.0, -3.0]).double()}, PolyakState(number(0), number(0))
    numbers = (number(0.5), number(0.1), number(10.0))
    first, state = polyak_ratio(grads, state, PARAMETERS, number(6.0), torch.tensor(True), numbers)
    assert float(first) == pytest.approx(3.0)
    assert (float(state.gnorm_ema), float(state.loss_ema)) == (2.0, 6.0)
    second, state = polyak_ratio(grads, state, PARAMETERS, number(2.0), torch.tensor(False), numbers)
    assert float(second) == pytest.approx(2.0) and float(state.loss_ema) == 4.0
    clamped, _ = polyak_ratio(grads, state, PARAMETERS, number(1e6), torch.tensor(True), numbers)
    assert float(clamped) == 10.0
    without, state = polyak_ratio(grads, state, PARAMETERS, None, torch.tensor(False), numbers)
    assert float(without) == 1.0 and float(state.loss_ema) == 4.0


def test_the_distance_is_the_largest_estimate_and_stays_without_gradient() -> None:
    autoscale = Autoscale(PARAMETERS, d0=1.0, coef=1.0, growth=math.inf, every=1, beta3=0.5)
    start = {"spectral/w": torch.tensor([[4.0, 0.0]]).double()}
    state = autoscale.init(start)
    still, state = autoscale.update({"spectral/w": torch.zeros(1, 2).double()}, start, state)
    assert float(still) == 1.0 and float(state.d) == 1.0
    # N = ⟨g, p₀ - p⟩ = 2 · 3, Σ|s| = 2: d̂ = 3
    grads, point = (
        {"spectral/w": torch.tensor([[2.0, 0.0]]).double()},
        {"spectral/w": torch.tensor([[1.0, 0.0]]).double()},
    )
    multiplier, state = autoscale.update(grads, point, state)
    assert (float(multiplier), float(state.d_max), float(state.numerator)) == (3.0, 3.0, 6.0)
    slow = Autoscale(PARAMETERS, d0=1.0, coef=1.0, growth=1.25, every=1, beta3=0.5)
    multiplier, state = slow.update(grads, point, slow.init(start))
    assert float(multiplier) == 3.0  # the first d is raised to its estimate, whatever the growth
    multiplier, state = slow.update(grads, {"spectral/w": torch.tensor([[-100.0, 0.0]]).double()}, state)
    assert float(multiplier) == 3.75 and float(state.d_max) > 90
