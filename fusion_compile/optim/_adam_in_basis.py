"""Adam's moments in the eigenbases of both sides of a matrix, for SOAP and its KL form."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._tree import map_tensors, update_mean
from fusion_compile.optim.matrix.inverse_roots import from_basis, to_basis


class Bases(NamedTuple):
    """Eigenbases (columns) of matrices ``[..., m, n]``: `left` ``[..., m, m]``, `right` ``[..., n, n]``."""

    left: Tensors
    right: Tensors


class Moments(NamedTuple):
    """First and second moment of the rotated gradient, shaped like the parameters."""

    mu: Tensors
    nu: Tensors


def update_moments(
    moments: Moments, gradients: Tensors, bases: Bases, beta1: Tensor, beta2: Tensor, first: Tensor
) -> Moments:
    """Running means of the rotated gradient and of its square. The first gradient has no basis yet and counts as 0."""
    rotated = map_tensors(lambda g, l, r: torch.where(first, 0.0, to_basis(g, l, r)), gradients, *bases)
    squares = map_tensors(Tensor.square, rotated)
    return Moments(update_mean(moments.mu, rotated, beta1), update_mean(moments.nu, squares, beta2))


def direction(moments: Moments, bases: Bases, eps: float) -> Tensors:
    """``Q_L (mu / (√nu + eps)) Q_Rᵀ``."""
    return map_tensors(lambda m, v, l, r: from_basis(m / (v.sqrt() + eps), l, r), *moments, *bases)
