"""FusionOpt's departures from the papers, as facts about `fusionopt_compat`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile.optim.fusionopt_compat import fusionopt_compat
from tests.data.bowl import SHAPES, SPECTRAL, Bowl, start_of
from tests.optim.fusionopt_walk import (
    BOWL,
    Run,
    bowl_run,
    on_bowl,
)


@pytest.mark.parametrize(("components", "peak"), [(None, 6.9e5), (("ns5", "normuon", "sf", "autoscale"), 5.6e5)])
def test_autoscale_multiplies_the_step_by_2300_at_the_second_update(components: Any, peak: float) -> None:
    run = bowl_run(components)
    losses, multipliers = [], []
    for update in range(1, 6):
        losses.append(on_bowl(run, update))
        multipliers.append(run.tells()["comp/autoscale_mult"])
    assert multipliers[0] == 1.0
    assert multipliers[1] == pytest.approx(2350, abs=60) and multipliers[2:] == multipliers[1:2] * 3
    assert losses[1] < losses[0] < 104 and losses[2] == pytest.approx(peak, rel=0.02)


def test_the_first_update_of_normuon_is_4_47_times_too_large() -> None:
    """Rows of length 1/√(1 - 0.95), whatever Newton-Schulz and √max(1, r/c) made of them; 1 once v has converged."""
    start = {n: p.double() for n, p in start_of(Bowl()).items()}
    run = bowl_run(("ns5", "normuon"), weight_decay=0.0)
    on_bowl(run, 1)
    for name in SPECTRAL:
        rows = ((run.weights()[name].double() - start[name]) / 1e-2).norm(dim=-1)  # lr 1e-3, ratio 10
        # The weights are near 0.05, so that their rounding is 4e-9 a entry, 1e-6 of an entry's move
        assert rows == pytest.approx(torch.full_like(rows, 0.05**-0.5), rel=1e-4)
    for components, moved in ((("ns5", "normuon"), 0.620), (("ns5",), 0.123)):
        run = bowl_run(components)
        on_bowl(run, 1)
        assert float((run.weights()["tall"].double() - start["tall"]).norm()) == pytest.approx(moved, abs=5e-4)


def test_the_ratio_sits_at_its_clamp_and_scaling_the_loss_changes_nothing() -> None:
    """Loss over mean |g| is 690 to 2,400 there, and both scale with the loss."""
    for scale in (1.0, 1e-2):
        run = Run(fusionopt_compat(("ns5",), 1e-3), BOWL, start_of(Bowl()), torch.float32)
        for update in range(1, 6):
            on_bowl(run, update, scale)
            tells = run.tells()
            assert tells["fusion/gamma_curr"] == 10.0
            assert 690 < tells["fusion/loss_ema"] / tells["fusion/gnorm_ema"] < 2400


def test_in_fp16_a_zero_or_a_large_matrix_gives_nan_because_the_cast_comes_before_the_norm() -> None:
    still = {n: torch.zeros(s) for n, s in SHAPES.items()}
    steep = {n: torch.full(s, 1e5) for n, s in SHAPES.items()}
    for grads, hot_dtype, finite in (
        (still, "fp16", False),
        (still, "fp16_safe", True),
        (still, "bf16", True),
        (still, "fp32", True),
        (steep, "fp16_safe", False),  # guarded products, but of an infinite matrix
        (steep, "bf16", True),
    ):
        run = bowl_run(("ns5",), hot_dtype=hot_dtype)
        run.step(grads, 1.0)
        assert bool(torch.isfinite(run.weights()["tall"]).all()) == finite, hot_dtype
