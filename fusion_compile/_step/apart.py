"""Gradients stay apart, one for each parameter, until their norm is known; then they are joined into banks.

A bank that is joined from the gradients as they come is allocated with its first part, at the beginning of the
backward, when all activations are alive: one whole set of gradients that the ordinary loop does not hold yet. A bank of
gradients that are scaled by the clip factor cannot begin before the backward is over, because the factor depends on
every one of them. Its price is a second set of gradients at the end of the backward, where the activations are gone.

On a GPU a matrix product is written straight into its place in the bank, which saves a launch for each; there the banks
come first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusion_compile._program.memory import banks_first
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors
from fusion_compile.optim._total import total_of_rows


def stays_apart(layout: Layout, saved: int, *, accumulate: int = 1) -> bool:
    """Whether the gradients of the parameters in `layout` stay apart until their norm is known.

    They do where the second set at the end is not the step's highest point: where `saved`, the bytes that the forward
    leaves to the backward, are more than one set. With several micro-batches a sum of gradients is alive in every
    backward anyhow, and a bank for the next ones would be a second set beside the activations.
    """
    one_set = sum(math.prod(bank.shape) for bank in layout.banks) * layout.state_dtype.itemsize
    first = banks_first.banks_first(layout.device.type)
    return not first and (accumulate > 1 or saved > one_set)


def norm_of(gradients: Tensors) -> Tensor:
    """Euclidean norm over all entries of `gradients` (by name, in fp32 or fp64), 0-dim.

    Each is summed up row by row and the rows' sums together, so that no kernel reads what another one has just made a
    bank of.
    """
    return total_of_rows([_rows(g * g) for g in gradients.values()], torch.zeros(())).sqrt()


def _rows(t: Tensor) -> Tensor:
    """Sums over all axes but the first, ``[N]``."""
    return t.sum(tuple(range(1, t.ndim))) if t.ndim > 1 else t.sum().reshape(1)
