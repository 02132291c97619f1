"""Factors of rows and columns, as all Kronecker preconditioners keep them."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim import Periodic
from fusion_compile.optim._kronecker import (
    above_zero,
    base_or_mean,
    eye_like,
    gain_of,
    mean_factors,
    periodic,
    preconditioner,
    zero_factors,
)


def test_without_a_base_the_update_is_the_mean_of_the_gradient() -> None:
    assert dict(base_or_mean("x", None, 0.7).hyperparameters) == {"beta1": 0.7}
    base = optim.scale_by_mona()
    assert base_or_mean("x", base, 0.7) is base
    with pytest.raises(ValueError, match=r"moves the gradient point; put scale_by_x\(\) inside it, not around it"):
        base_or_mean("scale_by_x", optim.sf_adamw(), 0.7)


def test_factors_are_square_zero_and_one_for_each_side() -> None:
    left, right = zero_factors({"w": torch.ones(3, 4, 6, dtype=torch.float64)}, "x")
    assert (left["w"].shape, right["w"].shape) == ((3, 4, 4), (3, 6, 6))
    assert left["w"].dtype == torch.float64 and not left["w"].any() and not right["w"].any()
    with pytest.raises(ValueError, match=r"x\(\) preconditions matrices; 'b' has shape \(5,\). Give it to AdamW"):
        zero_factors({"b": torch.ones(5)}, "x")


def test_the_means_of_the_factors_are_those_of_the_products() -> None:
    g = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
    left, right = mean_factors({"w": torch.eye(2)}, {"w": torch.zeros(2, 2)}, {"w": g}, torch.tensor(0.5))
    assert left["w"].tolist() == [[3.0, 1.0], [1.0, 1.0]]  # half of I and half of [[5, 2], [2, 1]]
    assert right["w"].tolist() == [[0.5, 1.0], [1.0, 2.5]]


def test_identities_share_no_memory() -> None:
    eyes = eye_like(torch.zeros(2, 3, 3))
    eyes[0, 0, 0] = 7.0
    assert torch.equal(eyes[1], torch.eye(3))


def test_a_gain_is_a_ratio_of_norms_and_zero_without_input() -> None:
    three, four = {"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}, {"a": torch.tensor([[10.0]])}
    assert float(gain_of(three, four)) == 0.5
    assert float(gain_of({"a": torch.zeros(1, 1)}, {"a": torch.zeros(1, 1)})) == 0.0
    assert float(above_zero(torch.tensor(0.0))) == torch.finfo(torch.float32).tiny


def test_periodic_work_needs_a_number_of_updates() -> None:
    work = periodic("w", 3, lambda s, p, c: s, lambda s, p, c: s)
    assert isinstance(work, Periodic) and work.every == 3
    with pytest.raises(ValueError, match="every=0 is not a number of updates; use 1 or more"):
        periodic("w", 0, lambda s, p, c: s, lambda s, p, c: s)


def test_a_preconditioner_takes_matrices_and_keeps_what_its_base_has() -> None:
    own = periodic("own", 5, lambda s, p, c: s, lambda s, p, c: s)
    base = optim.measured(optim.orthogonalize(audit_every=2), "size")
    extras = preconditioner("scale_by_x", base, base, {"knob": 1.0}, own, lambda base: base)
    assert (extras.name, extras.roles) == ("scale_by_x(orthogonalize)", ("spectral",))
    assert dict(extras.hyperparameters) == {"momentum": 0.95, "knob": 1.0}
    assert [w.name for w in extras.periodic] == ["audit", "own"] and extras.bind is not None
    mean = optim.scale_by_momentum()
    alone = preconditioner("scale_by_x", None, mean, {}, own, lambda base: base)
    assert (alone.name, alone.bind) == ("scale_by_x", None)
