"""Five hundred steps of every recipe, some of them skipped: each average is its source's, and its float64 twin."""

from __future__ import annotations

from typing import Any

import diffusers.training_utils
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import fusion_compile as fc
from tests.oracles import averaged as twins

STEPS, SKIPPED = 500, {0, 3, 77, 78, 79, 400}
# fp32: each step rounds an average below 2 by 1.2e-7 at most, and w (x - a) by as much; earlier roundings decay.
BOUND = 1e-6


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("recipe", sorted(fc.optim.RECIPES))
def test_of_every_recipe_with_skipped_steps(recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    averages = [
        fc.EMA(decay=0.99, name="constant"),
        fc.EMA(decay=0.999, warmup="ramp", update_after=5, name="ramp"),
        *fc.EMA.power(sigma_rel=0.10),
    ]
    matrices = ["weight"] if "spectral" in fc.optim.RECIPES[recipe]().roles else []
    options: dict[str, Any] = {"optimizer": recipe, "lr": 1e-3, "force_spectral": matrices, "mode": "eager"}
    step = fc.compile_training_step(model, lambda m, x: (m(x) - 1).square().mean(), ema=averages, **options)
    (weight, _), start = model.parameters(), model.weight.detach().clone()
    swa, follow = [start.clone()], get_ema_multi_avg_fn(0.99)
    shadow = nn.Parameter(start.clone())
    theirs = diffusers.training_utils.EMAModel([shadow], decay=0.999, update_after_step=5)
    weights, found = [], {ema.average.name: list[Tensor]() for ema in averages}
    data = torch.randn(STEPS, 4, 3)
    for i, x in enumerate(data):
        step(x * torch.nan if i in SKIPPED else x)
        for ema in averages:
            found[ema.average.name].append(ema.model.get_parameter("weight").detach().clone())
        if i in SKIPPED:
            assert all(torch.equal(seen[-1], (seen[-2:-1] or [start])[0]) for seen in found.values())
            continue
        weights.append(weight.detach().clone())
        follow(swa, [weights[-1]], 1)
        with torch.no_grad():
            shadow.copy_(weights[-1])
        theirs.step([shadow])
        torch.testing.assert_close(found["constant"][-1], swa[0], rtol=0, atol=BOUND)
        torch.testing.assert_close(found["ramp"][-1], theirs.shadow_params[0], rtol=0, atol=BOUND)
    assert int(step.metrics["skipped"]) == len(SKIPPED) and not torch.equal(weights[-1], start)
    taken = range(1, len(weights) + 1)
    profile, gamma = averages[2].average.name, averages[2].average.gamma
    for name, decays in (
        ("constant", [0.99] * len(weights)),
        ("ramp", [twins.diffusers_decay(n, 0.999, "ramp", 1.0, 1.0, 0.0, 5) for n in taken]),
        (profile, [twins.profile_decay(n, gamma) for n in taken]),
    ):
        want = np.stack(list(twins.averages(start.double().numpy(), [w.double().numpy() for w in weights], decays)))
        got = np.stack([a.double().numpy() for i, a in enumerate(found[name]) if i not in SKIPPED])
        assert np.abs(got - want).max() < BOUND, name
