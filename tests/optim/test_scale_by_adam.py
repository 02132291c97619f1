"""`scale_by_adam` against its formula, written out by hand."""

from __future__ import annotations

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, Walk, same


def test_adam_divides_the_corrected_mean_by_the_root_of_the_corrected_square() -> None:
    walk = Walk(optim.scale_by_adam((0.9, 0.99), 1e-3))
    same(walk(G1), G1 / (G1.abs() + 1e-3))  # both corrections cancel the first averages exactly
    m, v = 0.09 * G1 + 0.1 * G2, 0.0099 * G1**2 + 0.01 * G2**2
    same(walk(G2), m / (1 - 0.81) / ((v / (1 - 0.9801)).sqrt() + 1e-3))


def test_adam_corrects_by_the_betas_really_used() -> None:
    walk = Walk(optim.scale_by_adam((0.9, 0.99), 0.0))
    walk(G1, beta1=0.5, beta2=0.8)
    m, v = 0.9 * 0.5 * G1 + 0.1 * G2, 0.99 * 0.2 * G1**2 + 0.01 * G2**2
    same(walk(G2), m / (1 - 0.9 * 0.5) / (v / (1 - 0.99 * 0.8)).sqrt())
