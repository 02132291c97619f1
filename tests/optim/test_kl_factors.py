"""KL-Shampoo's factors: first values, one update by hand, bounds, bases."""

from __future__ import annotations

import pytest
import torch

from fusion_compile.optim._kl_factors import (
    KLOptions,
    check_options,
    find_bases,
    init_factors,
    refresh_bases,
    update_factors,
)

HALF, YES, NO = torch.tensor(0.5, dtype=torch.float64), torch.tensor(True), torch.tensor(False)
OPTIONS = KLOptions(init_factor=0.25, max_inverse_root=None)


def factors(m: int = 2, n: int = 3) -> object:
    return init_factors({"w": torch.zeros(m, n, dtype=torch.float64)}, "x")


def test_the_first_gradient_is_measured_by_itself_and_sets_all_eigenvalues() -> None:
    g = {"w": torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)}
    f = update_factors(init_factors(g, "x"), g, HALF, YES, OPTIONS)
    torch.testing.assert_close(f.left["w"], 0.5 * g["w"] @ g["w"].mT / 3)
    torch.testing.assert_close(f.right["w"], 0.5 * g["w"].mT @ g["w"] / 2)
    assert f.left_root["w"].tolist() == [2.0, 2.0] and f.right_root["w"].tolist() == [2.0, 2.0, 2.0]  # 1 / √0.25


def test_later_each_side_is_measured_with_the_other_divided_out() -> None:
    g = {"w": torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)}
    before = update_factors(init_factors(g, "x"), g, HALF, YES, OPTIONS)
    f = update_factors(before, g, HALF, NO, OPTIONS)
    # Roots of 2: G S_b⁻¹ Gᵀ / n = 4 G Gᵀ / 3, and its mean with what was there.
    torch.testing.assert_close(f.left["w"], 0.5 * before.left["w"] + 0.5 * 4 * (g["w"] @ g["w"].mT) / 3)
    # Row 1: λ = 0.25 goes half the way to mean_j 4 G_1j² = 16/3; row 2 to 4/3.
    wanted = [(0.125 + 0.5 * value) ** -0.5 for value in (16 / 3, 4 / 3)]
    assert f.left_root["w"].tolist() == pytest.approx(wanted, rel=1e-12)


def test_an_inverse_root_is_bounded_by_the_side_and_the_option() -> None:
    g = {"w": torch.zeros(2, 3, dtype=torch.float64)}
    beta = torch.tensor(1e-12, dtype=torch.float64)  # eigenvalues fall to 1e-12 of themselves
    bounded = KLOptions(init_factor=1.0, max_inverse_root=4000.0)
    f = update_factors(update_factors(init_factors(g, "x"), g, beta, YES, bounded), g, beta, NO, bounded)
    assert f.left_root["w"].tolist() == [10.0, 10.0]  # never below 10, on a side of 2
    free = KLOptions(init_factor=1.0, max_inverse_root=None)
    f = update_factors(update_factors(init_factors(g, "x"), g, beta, YES, free), g, beta, NO, free)
    # 1 - (1 - 1e-12) knows 1e-12 to 1e-4
    assert f.left_root["w"].tolist() == pytest.approx([1e6, 1e6], rel=1e-3)


def test_bases_diagonalize_and_eigenvalues_stay() -> None:
    torch.manual_seed(0)
    g = {"w": torch.randn(4, 6, dtype=torch.float64)}
    f = update_factors(init_factors(g, "x"), g, HALF, YES, OPTIONS)
    found = find_bases(f)
    diagonal = found.left_basis["w"].mT @ f.left["w"] @ found.left_basis["w"]
    torch.testing.assert_close(diagonal, diagonal.diag().diag(), rtol=0, atol=1e-13)
    again = refresh_bases(found)
    torch.testing.assert_close(again.left_basis["w"].abs(), found.left_basis["w"].abs(), rtol=0, atol=1e-10)
    assert found.left_root is f.left_root and again.right_root is f.right_root


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (KLOptions(init_factor=0.0), "init_factor=0.0 is the first eigenvalue; use a number above 0"),
        (KLOptions(max_inverse_root=0.0), "max_inverse_root=0.0 bounds"),
    ],
)
def test_what_would_divide_by_zero_is_refused(options: KLOptions, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_options(options)
