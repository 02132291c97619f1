"""Our recipes, through `compile_training_step`, against what official implementations did (tests/data/README.md)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile import compile_training_step, optim
from fusion_compile.optim import Named, Transform
from tests.data.bowl import SCALAR, SHAPES, SPECTRAL, UPDATES, Bowl, loss_fn, noise, start_of, trace
from tests.data.official import CASES, Case

AUX: dict[str, Any] = {"scalar_lr": 1e-3, "scalar_betas": (0.9, 0.95), "scalar_weight_decay": 0.0}
FP32: dict[str, Any] = {"matmul_dtype": torch.float32}


def sf_muon(weight_decay: float = 0.0) -> Transform:
    """Schedule-Free over Muon on matrices, plain AdamW on the rest, composed as a user would from public parts."""
    spectral = optim.chain(
        optim.orthogonalize(0.95, **FP32),
        optim.scale_by_shape("original"),
        optim.add_decayed_weights(weight_decay),
        optim.scale_by_learning_rate(0.02),
    )
    scalar = optim.chain(
        optim.scale_by_adam((Named("scalar_beta1", 0.9), Named("scalar_beta2", 0.95)), Named("scalar_eps", 1e-8)),
        optim.scale_by_learning_rate(Named("scalar_lr", 1e-3)),
    )
    return optim.partition({"spectral": optim.schedule_free(spectral, 0.02, 0.9), "scalar": scalar})


OFFICIAL: dict[str, Callable[[], Transform]] = {
    "torch_muon_original_fp32ns": lambda: optim.muon(0.02, weight_decay=0.1, **AUX, **FP32),
    "muon_kellerjordan_fp32ns": lambda: optim.muon(0.02, weight_decay=0.0, **AUX, **FP32),
    "normuon_official_fp32ns": lambda: optim.normuon(0.02, **AUX, **FP32),
    "po_normuon_match_rms_fp32ns": lambda: optim.normuon(0.02, scale="match_rms", **AUX, **FP32),
    "sf_adamw": lambda: optim.sf_adamw(2.5e-3),
    "sf_wrapper_muon_nowd_fp32ns": sf_muon,
}


def test_every_stored_case_has_a_recipe() -> None:
    assert set(OFFICIAL) == set(CASES)


def ratios(name: str, transform: Transform, updates: tuple[int, ...] = UPDATES) -> dict[tuple[int, str, str], float]:
    """Error over bound, by update, kind of point and tensor."""
    case, model = Case(name), Bowl()
    start = start_of(model)
    step = compile_training_step(model, loss_fn, optimizer=transform, mode="eager")
    assert [r.name for r in step.routes if r.role == "spectral"] == ([] if name == "sf_adamw" else list(SPECTRAL))
    found: dict[tuple[int, str, str], float] = {}
    for update in range(1, max(updates) + 1):
        step(*noise(update - 1))
        if update in updates:
            for kind in case.kinds:
                point = step.gradient_point() if kind == "y" else dict(model.named_parameters())
                point = {n: p.detach() for n, p in point.items()}
                found |= {(update, kind, n): r for n, r in case.ratios(update, kind, trace(point, start)).items()}
    assert len(found) == len(updates) * len(case.kinds) * len(SHAPES)
    return found


@pytest.mark.parametrize("name", CASES)
def test_recipe_follows_the_official_trajectory(name: str) -> None:
    """At most 1: within 3·floor + 2e-5 + 1e-7/‖displacement‖, the README's bound for other kernels."""
    far = {key: ratio for key, ratio in ratios(name, OFFICIAL[name]()).items() if not ratio <= 1}
    assert not far, far


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("torch_muon_original_fp32ns", lambda: optim.muon(0.02, weight_decay=0.0998, **AUX, **FP32)),
        ("normuon_official_fp32ns", lambda: optim.normuon(0.02, betas=(0.95, 0.951), **AUX, **FP32)),
        ("sf_adamw", lambda: optim.sf_adamw(2.5e-3, betas=(0.9001, 0.999))),
        ("sf_wrapper_muon_nowd_fp32ns", lambda: sf_muon(weight_decay=0.01)),
    ],
)
def test_the_bound_notices_a_hyperparameter_that_is_slightly_off(name: str, wrong: Callable[[], Transform]) -> None:
    assert max(ratios(name, wrong(), (20,)).values()) > 1


def test_where_nothing_is_averaged_the_gradient_point_is_the_weights_themselves() -> None:
    model = Bowl()
    step = compile_training_step(model, loss_fn, optimizer=sf_muon(), mode="eager")
    for update in range(3):
        step(*noise(update))
    point = step.gradient_point()
    assert all(torch.equal(point[n], model.get_parameter(n)) for n in SCALAR)
    assert not any(torch.equal(point[n], model.get_parameter(n)) for n in SPECTRAL)
