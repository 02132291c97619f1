"""Adafactor's second moment: one number for each row and each column of a matrix (Shazeer & Stern, 1804.04235)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    MATRIX,
    Context,
    Extras,
    Number,
    Transform,
    by_name,
    declare,
)


class ScaleByFactoredRmsState(NamedTuple):
    """Running means of squares: `row` ``[..., m, 1]`` and `column` ``[..., 1, n]`` of matrices, `nu` of flat banks."""

    row: Tensors
    column: Tensors
    nu: Tensors


def scale_by_factored_rms(beta: Number = 0.999, *, eps: float = 1e-30) -> Transform:
    """``g / √v`` with ``v = row column / mean(row)``: entries are about 1 in size.

    ``row ← β₂ row + (1 - β₂) mean_columns(g² + eps)``, ``column`` alike. Convolutions are matrices of their first axis
    and all others; stacks of experts are matrices one by one. Parameters of one axis keep a full second moment. There
    is no bias correction: the first update is 1/√(1 - β₂) times too large, so put `clip_update_rms` behind it.
    4 (m + n) bytes a matrix, 4 bytes an entry of the rest.
    Source: 1804.04235, with `eps` inside the mean as in Adafactor of transformers and in K-Optimizers. Deviations: a
    constant β₂.

    Args:
        beta: β₂. Live as ``beta2``.
        eps: Added to every square. At 1e-30 the direction does not depend on the gradient's size.

    Returns:
        A transform without a step, for the roles ``"matrix"`` and ``"scalar"``.

    Raises:
        ValueError: `eps` is negative.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.scale_by_factored_rms(), optim.clip_update_rms())
        >>> direction.roles
        ('matrix', 'scalar')
    """
    if not eps >= 0:
        raise ValueError(f"eps={eps!r} is added to squares; give 0 or more.")
    b2 = declare("beta2", beta)

    def init(params: Tensors) -> ScaleByFactoredRmsState:
        matrices = {k: p for k, p in params.items() if p.ndim > 1}
        return ScaleByFactoredRmsState(
            {k: p.new_zeros((*p.shape[:-1], 1)) for k, p in matrices.items()},
            {k: p.new_zeros((*p.shape[:-2], 1, p.shape[-1])) for k, p in matrices.items()},
            {k: p.new_zeros(p.shape) for k, p in params.items() if p.ndim <= 1},
        )

    def update(
        updates: Tensors, state: ScaleByFactoredRmsState, params: Tensors, context: Context
    ) -> tuple[Tensors, ScaleByFactoredRmsState]:
        beta2 = context.hyperparameters[b2.name]
        scaled: Tensors = {}
        row: Tensors = {}
        column: Tensors = {}
        nu: Tensors = {}
        for k, g in updates.items():
            square = g * g + eps
            if g.ndim > 1:
                row[k] = beta2 * state.row[k] + (1 - beta2) * square.mean(-1, keepdim=True)
                column[k] = beta2 * state.column[k] + (1 - beta2) * square.mean(-2, keepdim=True)
                scaled[k] = g * inverse_root(row[k], column[k])
            else:
                nu[k] = beta2 * state.nu[k] + (1 - beta2) * square
                scaled[k] = g * nu[k].rsqrt()
        return scaled, ScaleByFactoredRmsState(row, column, nu)

    extras = Extras("scale_by_factored_rms", by_name(b2), (MATRIX, ELEMENTWISE), second_moments=("row", "column", "nu"))
    return Transform(init, update, extras)


def inverse_root(row: Tensor, column: Tensor) -> Tensor:
    """``1 / √v`` of the second moment that rows ``[..., m, 1]`` and columns ``[..., 1, n]`` stand for."""
    return (row / row.mean(-2, keepdim=True)).rsqrt() * column.rsqrt()
