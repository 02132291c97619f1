"""FusionOpt's step put together: diagnostics, Hyperball, roles."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.optim.fusionopt_compat import fusionopt_compat
from tests.data.bowl import SCALAR, SHAPES, Bowl, noise, start_of
from tests.optim.fusionopt_walk import (
    BOWL,
    OPTIONS,
    Run,
    bowl_run,
    follow,
    on_bowl,
)


def test_without_a_loss_the_ratio_is_one() -> None:
    worst, run, twin = follow(OPTIONS["full fusion"], torch.float64, 10, loss=False)
    assert worst <= 1e-11 and twin.ratio == 1.0
    assert run.tells()["fusion/gamma_curr"] == 1.0 and run.tells()["fusion/loss_ema"] == 0.0


def test_hyperball_keeps_the_norm_and_gives_a_zero_matrix_the_plain_update() -> None:
    start = {**start_of(Bowl()), "wide": torch.zeros(SHAPES["wide"])}
    run = Run(fusionopt_compat(("ns5", "normuon"), 1e-3, hyperball=True), BOWL, start, torch.float32)
    plain = Run(fusionopt_compat(("ns5", "normuon"), 1e-3), BOWL, start, torch.float32)
    for update in range(1, 4):
        grads = dict(zip(SHAPES, noise(update), strict=True))
        run.step(grads, 1.0)
        plain.step(grads, 1.0)
    for name in ("tall", "square"):
        assert float(run.weights()[name].norm()) == pytest.approx(float(start[name].norm()), rel=1e-6)
        assert float(plain.weights()[name].norm()) != pytest.approx(float(start[name].norm()), rel=1e-3)
    for name in ("wide", *SCALAR):
        assert torch.equal(run.weights()[name], plain.weights()[name])


def test_diagnostics_bear_fusionopts_names_and_measure_what_they_say() -> None:
    run = bowl_run(None)
    for update in range(1, 3):
        on_bowl(run, update)
    tells = run.tells()
    spectral = {"momentum_norm", "mona_curvature_norm", "shampoo_gain", "ns5_gain", "normuon_gain", "snr_gain"}
    spectral |= {"spectral_update_norm", "cautious_keep_frac"}
    own = {"gamma_t", "decay", "autoscale_mult", "autoscale_d", "scalar_grad_norm"}
    fusion = {"fusion/step_count", "fusion/gnorm_ema", "fusion/loss_ema", "fusion/gamma_curr"}
    assert set(tells) == fusion | {f"comp/{name}" for name in spectral | own}
    momentum = sum(float(m.double().square().sum()) for m in run.state.spectral.momentum.values()) ** 0.5
    assert tells["comp/momentum_norm"] == pytest.approx(momentum, rel=1e-5)
    assert 0.4 < tells["comp/cautious_keep_frac"] < 1 and 0 < tells["comp/snr_gain"] <= 1
    quiet = fusionopt_compat(telemetry=False).init(run.params)
    assert set(quiet.measured) == {"gamma_curr", "gamma_t", "decay", "autoscale_mult"}


def test_a_bank_of_another_role_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding/8x8"):
        fusionopt_compat().init({"embedding/8x8": torch.zeros(8, 8)})
