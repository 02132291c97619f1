"""The weights of Schedule-Free's average, and where between z and x the gradient is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile.optim import Context, Named
from fusion_compile.optim._averaging import Averaging

BETA, BETA_MAX = Named("beta", 0.5), Named("beta_max", 0.875)
CONTEXT = Context({"beta": torch.tensor(0.5).double(), "beta_max": torch.tensor(0.875).double()})


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_beta_goes_from_one_end_to_the_other_along_the_logarithm_of_what_is_left() -> None:
    averaging = Averaging(BETA, BETA_MAX, anneal=2)
    found = [float(averaging.beta_now({"k": number(k)}, CONTEXT)) for k in (0.0, 1.0, 2.0, 9.0)]
    assert found == pytest.approx([0.5, 0.75, 0.875, 0.875], rel=1e-15)  # 1 - β halves twice in two updates
    assert float(Averaging(BETA, BETA_MAX).beta_now({}, CONTEXT)) == 0.5


def test_the_point_lies_between_z_and_x_with_the_beta_of_the_last_update() -> None:
    averaging = Averaging(BETA, BETA_MAX, anneal=2)
    x, z = {"w": number(1.0)}, {"w": number(5.0)}
    assert float(averaging.point(x, z, {"k": number(2.0)}, CONTEXT)["w"]) == pytest.approx(5 - 0.75 * 4, rel=1e-15)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [1.0, 9.0, 9.0]),
        ({"average": "lr"}, [1.0, 9.0, 4.0]),
        ({"weight_lr_power": 1.0}, [1.0, 3.0, 3.0]),
        ({"r": 2.0}, [1.0, 36.0, 81.0]),
    ],
)
def test_weights_are_those_of_the_options(options: dict[str, Any], weights: list[float]) -> None:
    averaging = Averaging(BETA, BETA_MAX, **options)
    x, z = {"w": number(0.0)}, {"w": number(1.0)}
    lr_max, weight_sum, taken = number(0.0), number(0.0), averaging.taken(x)
    for k, lr in enumerate((1.0, 3.0, 2.0)):
        moved, lr_max, weight_sum, taken = averaging.move(x, z, number(lr), lr_max, weight_sum, taken)
        assert float(moved["w"]) == pytest.approx(weights[k] / sum(weights[: k + 1]), rel=1e-15)
    assert float(weight_sum) == sum(weights) and float(lr_max) == 3.0


def test_during_c_warmup_x_is_z_and_nothing_is_weighed() -> None:
    averaging = Averaging(BETA, BETA_MAX, c_warmup=1)
    x, z = {"w": number(4.0)}, {"w": number(1.0)}
    moved, _, weight_sum, taken = averaging.move(x, z, number(1.0), number(0.0), number(0.0), averaging.taken(x))
    assert (float(moved["w"]), float(weight_sum), float(taken["k"])) == (-3.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"anneal": -1}, "anneal=-1 is not a number of updates"),
        ({"c_warmup": True}, "c_warmup=True is not a number of updates"),
        ({"r": -0.5}, r"r=-0\.5 is not an exponent"),
        ({"average": "mean"}, "average='mean' is not known; use one of 'lr_max', 'lr'"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Averaging(BETA, BETA_MAX, **options)
