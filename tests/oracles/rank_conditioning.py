"""Linear layers of a conditioning vector on a low-dimensional affine subspace, by an SVD in numpy float64.

Vectors g_b(t_j), row b of a batch at sample j of the timestep; m_b their mean over j, E the first `rank` right singular
vectors of all differences g_b(t_j) - m_b stacked. Then W g + b is replaced by W E E^T (g - m) + W m + b: the closest of
its kind in the least squares of g over all samples (Eckart and Young 1936).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def fit(samples: Array, rank: int) -> tuple[Array, Array]:
    """``[samples, rows, in]`` -> mean ``[rows, in]`` and orthonormal basis ``[in, rank]``."""
    mean = samples.mean(axis=0)
    differences = (samples - mean).reshape(-1, samples.shape[-1])
    return mean, np.linalg.svd(differences, full_matrices=False)[2][:rank].T


def project(g: Array, mean: Array, basis: Array) -> Array:
    """The point of the subspace nearest to each row of g ``[rows, in]``."""
    return mean + (g - mean) @ basis @ basis.T


def layer(g: Array, weight: Array, bias: Array, mean: Array, basis: Array) -> Array:
    """``[rows, in]`` through a layer ``[out, in]`` that knows the subspace only: ``[rows, out]``."""
    return project(g, mean, basis) @ weight.T + bias


def relative_difference(got: Array, exact: Array) -> float:
    """The Frobenius norm of the difference as a share of that of `exact`."""
    return float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
