"""`scale_by_rms` against its formula, written out by hand."""

from __future__ import annotations

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, Walk, same


def test_rms_has_no_first_moment() -> None:
    walk = Walk(optim.scale_by_rms(0.99, 1e-3))
    same(walk(G1), G1 / (G1.abs() + 1e-3))
    v = 0.0099 * G1**2 + 0.01 * G2**2
    same(walk(G2), G2 / ((v / (1 - 0.9801)).sqrt() + 1e-3))
