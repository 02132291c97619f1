"""The fit of a conditioning curve, against a singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._sampler.rank.fit import principal_directions


@pytest.mark.parametrize("shape", [(40, 1, 6), (3, 2, 20)], ids=["more points than columns", "fewer"])
def test_directions_are_the_leading_singular_vectors_of_the_differences(shape: tuple[int, ...]) -> None:
    points = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, basis = principal_directions(points, 2)
    assert torch.allclose(mean, points.mean(0), rtol=0, atol=1e-15)  # float64
    differences = (points - mean).flatten(0, 1)
    leading = torch.linalg.svd(differences, full_matrices=False).Vh[:2].T
    # float64, and the gaps between singular values of these points are above 0.1
    torch.testing.assert_close(basis @ basis.T, leading @ leading.T, rtol=0, atol=1e-10)


def test_a_curve_in_few_dimensions_is_spanned_and_the_basis_stays_orthonormal() -> None:
    line = torch.linspace(0, 1, 9, dtype=torch.float64)[:, None, None] * torch.tensor([[3.0, 4.0, 0, 0]]).double()
    mean, basis = principal_directions(line, 3)
    assert basis.shape == (4, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)  # float64
    differences = (line - mean).flatten(0, 1)
    torch.testing.assert_close(differences @ basis @ basis.T, differences, rtol=0, atol=1e-12)
