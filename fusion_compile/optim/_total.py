"""One number from the entries of all banks.

The sums of all rows are laid side by side and summed once. Adding up one sum for each bank would be a chain of kernels
that work on one number each. On a GPU it would be worse: Inductor fuses the last bank's sum with that chain and with
all that hangs on the result, and Triton 3.7 cannot compile such a kernel where the result is stored and also decides
what else is stored, as a gradient's norm does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def total(tensors: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The sum over all entries of all `tensors`, 0-dim, in their common dtype; `zero` without tensors."""
    return total_of_rows([_sums_of_rows(t) for t in tensors], zero)


def total_of_rows(rows: Sequence[Tensor], zero: Tensor) -> Tensor:
    """The same for short vectors, ``[N]`` each, whose entries are sums already."""
    if not rows:
        return zero
    return (rows[0] if len(rows) == 1 else torch.cat(list(rows))).sum()


def _sums_of_rows(t: Tensor) -> Tensor:
    # Rows first: a sum over the last dimension fuses with the loop that makes t, a sum over everything does not.
    return t.sum(-1).reshape(-1) if t.ndim > 1 else t.sum().reshape(1)
