"""`scale_by_momentum` against its formula, written out by hand."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, P, Walk, same
from tests.optim.walks import keeps_the_laws


@pytest.mark.parametrize("nesterov", [False, True])
def test_it_is_an_average_from_zero_with_or_without_a_look_ahead(nesterov: bool) -> None:
    walk = Walk(optim.scale_by_momentum(0.8, nesterov=nesterov))
    mu = 0.2 * G1
    same(walk(G1), 0.2 * G1 + 0.8 * mu if nesterov else mu)
    mu = 0.8 * mu + 0.2 * G2
    same(walk(G2), 0.2 * G2 + 0.8 * mu if nesterov else mu)


def test_its_decay_is_live() -> None:
    walk = Walk(optim.scale_by_momentum(0.8))
    walk(G1, momentum=0.0)
    same(walk(G2, momentum=1.0), G1)


def test_laws() -> None:
    keeps_the_laws(optim.scale_by_momentum(0.8), {"w": P.clone()})
    keeps_the_laws(optim.scale_by_momentum(0.8, nesterov=True), {"w": torch.randn(3, 4)})
