"""`normalize_neurons` against its formula, written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, Walk


def rows_normalized(o: Tensor, nu: Tensor) -> Tensor:
    return o / nu.sqrt()[:, None]


def test_normalize_neurons_preserves_the_norm() -> None:
    walk = Walk(optim.normalize_neurons(0.9))
    nu = 0.1 * (G1**2).mean(1)
    p1 = rows_normalized(G1, nu)
    torch.testing.assert_close(
        walk(G1), p1 * G1.norm() / p1.norm(), rtol=1e-8, atol=0
    )  # eps 1e-10 beside values of 0.1
    nu = 0.9 * nu + 0.1 * (G2**2).mean(1)
    p2 = rows_normalized(G2, nu)
    torch.testing.assert_close(walk(G2), p2 * G2.norm() / p2.norm(), rtol=1e-8, atol=0)


def test_normalize_neurons_matches_an_rms_of_a_fifth() -> None:
    walk = Walk(optim.normalize_neurons(0.9, scale="match_rms"))
    p1 = rows_normalized(G1, 0.1 * (G1**2).mean(1))
    out = walk(G1)
    torch.testing.assert_close(out, 0.2 * p1 * math.sqrt(6) / p1.norm(), rtol=1e-8, atol=0)  # eps 1e-10
    assert float(out.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-8)


def test_an_option_that_is_not_known_lists_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'rms' is not known.*'preserve_norm', 'match_rms'"):
        optim.normalize_neurons(scale="rms")
