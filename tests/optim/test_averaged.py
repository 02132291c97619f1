"""Averages of the weights follow their sources and float64 twins, whatever is inside."""

from __future__ import annotations

from typing import Any

import diffusers.training_utils
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fusion_compile import optim
from fusion_compile.optim import Average
from fusion_compile.optim._transform import Context
from tests.oracles import averaged as twins

STEPS = 500
# fp32: each of 500 updates rounds an average below 2 by 1.2e-7 at most, and w (x - a) by as much; errors of earlier
# updates decay. The issue of equal sums in another order does not arise.
BOUND = 1e-6


def walk() -> tuple[Tensor, list[Tensor]]:
    """Weights below 2, and 500 steps of size 0.02."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(16, generator=generator).clamp(-1, 1)
    return start, [0.02 * torch.randn(16, generator=generator) for _ in range(STEPS)]


def followed(*averages: Average) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """The weights after each step, and each average."""
    start, moves = walk()
    given = optim.Transform(lambda params: (), lambda updates, state, params, context: (updates, state), optim.Extras())
    transform = optim.averaged(given, averages)
    numbers = {name: torch.tensor(value) for name, value in transform.hyperparameters.items()}
    params, state = {"scalar": start.clone()}, transform.init({"scalar": start.clone()})
    weights, found = [], {a.name: list[Tensor]() for a in averages}
    for move in moves:
        updates, state = transform.update({"scalar": move}, state, params, Context(numbers))
        params = {"scalar": params["scalar"] + updates["scalar"]}
        weights.append(params["scalar"])
        for name in found:
            found[name].append(state.averages[name]["scalar"])
    return weights, found


def twin(weights: list[Tensor], decays: list[float | None]) -> np.ndarray[Any, Any]:
    start, _ = walk()
    return np.stack(list(twins.averages(start.numpy(), [w.double().numpy() for w in weights], decays)))


def test_a_constant_decay_is_torchs() -> None:
    weights, found = followed(Average(rate=1 - 0.99))
    average, follow = [walk()[0].clone()], get_ema_multi_avg_fn(0.99)
    for w, got in zip(weights, found["ema"], strict=True):
        follow(average, [w], 1)
        torch.testing.assert_close(got, average[0], rtol=0, atol=BOUND)
    assert np.abs(np.stack([a.numpy() for a in found["ema"]]) - twin(weights, [0.99] * STEPS)).max() < BOUND


@pytest.mark.parametrize(
    ("warmup", "given"),
    [
        ("ramp", {}),
        ("ramp", {"after": 7}),
        ("power", {"inv_gamma": 3.0, "power": 0.75}),
        ("power", {"min_decay": 0.5, "after": 2}),
    ],
)
def test_a_warm_up_is_diffusers_and_its_twin(warmup: str, given: dict[str, Any]) -> None:
    weights, found = followed(Average(rate=0.001, warmup=warmup, **given))
    parameter = torch.nn.Parameter(walk()[0].clone())
    theirs = diffusers.training_utils.EMAModel(
        [parameter],
        decay=0.999,
        use_ema_warmup=warmup == "power",
        inv_gamma=given.get("inv_gamma", 1.0),
        power=given.get("power", 2 / 3),
        min_decay=given.get("min_decay", 0.0),
        update_after_step=given.get("after", 0),
    )
    for w, got in zip(weights, found["ema"], strict=True):
        with torch.no_grad():
            parameter.copy_(w)
        theirs.step([parameter])
        torch.testing.assert_close(got, theirs.shadow_params[0], rtol=0, atol=BOUND)
    least, after = given.get("min_decay", 0.0), given.get("after", 0)
    numbers = (0.999, warmup, given.get("inv_gamma", 1.0), given.get("power", 2 / 3), least, after)
    want = twin(weights, [twins.diffusers_decay(n, *numbers) for n in range(1, STEPS + 1)])
    assert np.abs(np.stack([a.numpy() for a in found["ema"]]) - want).max() < BOUND


def test_profiles_and_averages_that_move_now_and_then_are_their_twins() -> None:
    wide, narrow = Average("wide", warmup="profile", gamma=6.94), Average("narrow", warmup="profile", gamma=16.97)
    seldom = Average("seldom", rate=0.05, every=10)
    weights, found = followed(wide, narrow, seldom)
    steps = range(1, STEPS + 1)
    wanted: dict[str, list[float | None]] = {
        "wide": [twins.profile_decay(n, 6.94) for n in steps],
        "narrow": [twins.profile_decay(n, 16.97) for n in steps],
        "seldom": [0.95 if n % 10 == 0 else None for n in steps],
    }
    for name, decays in wanted.items():
        assert np.abs(np.stack([a.numpy() for a in found[name]]) - twin(weights, decays)).max() < BOUND
    assert torch.equal(found["seldom"][18], found["seldom"][9])


def test_a_profile_late_in_a_training_moves_by_the_right_share() -> None:
    # (γ + 1) / n to first order; a decay kept in fp32 would be wrong by a tenth of it.
    n = torch.tensor(2_000_000)
    assert float(Average(warmup="profile", gamma=6.94).least(n)) == pytest.approx(1 - (1 - 1 / 2e6) ** 7.94, rel=1e-5)


def test_names_and_numbers() -> None:
    transform = optim.averaged(optim.adamw(1e-3), [Average(), Average("slow", rate=1e-5)])
    assert (transform.hyperparameters["ema_rate"], transform.hyperparameters["slow_ema_rate"]) == (1e-4, 1e-5)
    assert transform.roles == optim.adamw(1e-3).roles and transform.name == "adamw"
    for odd in ([], [Average(), Average()]):
        with pytest.raises(ValueError, match="each with a name of its own"):
            optim.averaged(optim.adamw(1e-3), odd)
