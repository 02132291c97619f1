"""NorMuon's second step: scale every row (neuron) of the orthogonalized update by itself (Li et al., 2510.05491)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._ranges import refuse_given
from fusion_compile.optim._transform import (
    SPECTRAL,
    BankInfos,
    Blocks,
    Context,
    Extras,
    Number,
    Transform,
    by_name,
    declare,
)
from fusion_compile.optim.matrix.blocks import in_blocks


class NormalizeNeuronsState(NamedTuple):
    """`nu`: running mean of squares of each row, ``[..., r, 1]``; with blocks of columns ``[..., r, blocks]``."""

    nu: Tensors


SCALES = ("preserve_norm", "match_rms")


def normalize_neurons(beta: Number = 0.95, *, scale: str = "preserve_norm", eps: float = 1e-10) -> Transform:
    """``P = O / (sqrt(nu) + eps)`` with ``nu ← lerp(nu, mean_j O_ij², 1 - β₂)``, then one factor for the whole matrix.

    The factor cancels the scale of nu, so nu needs no bias correction. In a bank with blocks every block has neurons
    and a factor of its own. Matrices ``[..., r, c]``; 4 bytes a row (and block of columns).
    Source: 2510.05491 and the authors' code. Deviations: none.

    Args:
        beta: β₂, decay of the row means. Live as ``beta2``.
        scale: ``"preserve_norm"`` brings P back to ‖O‖_F (the authors' code); ``"match_rms"`` to a root mean square of
            0.2, ``0.2 √(rc) P / ‖P‖`` (the paper, and SF-NorMuon), so that one unit of lr moves like one of AdamW's.
        eps: Added to the root of nu, and to the norm that is divided by.

    Returns:
        A transform without a step, for the role ``"spectral"``.

    Raises:
        ValueError: `scale` is not one of the two.

    Example:
        >>> from fusion_compile import optim
        >>> direction = optim.chain(optim.orthogonalize(0.95), optim.normalize_neurons(0.95, scale="match_rms"))
        >>> direction.hyperparameters["beta2"]
        0.95
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known; use one of {', '.join(map(repr, SCALES))}.")
    refuse_given("eps", eps, "eps")
    b2 = declare("beta2", beta)

    def normalized(o: Tensor, nu: Tensor, beta2: Tensor) -> tuple[Tensor, Tensor]:
        r, c = o.shape[-2:]
        mean_square = o.square().mean(-1, keepdim=True)
        nu = nu + (1 - beta2) * (mean_square - nu)
        per_row = 1 / (nu.sqrt() + eps)
        # Both norms follow from the row means: O is read once, and no second pass over the result is needed.
        new_norm = (c * mean_square * per_row.square()).sum(-2, keepdim=True).sqrt()
        if scale == "preserve_norm":
            target = (c * mean_square).sum(-2, keepdim=True).sqrt()
        else:
            target = torch.full_like(new_norm, 0.2 * (r * c) ** 0.5)
        return o * (per_row * (target / (new_norm + eps))), nu

    def built(infos: BankInfos) -> Transform:
        blocks = {key: info.blocks for key, info in infos.items()}

        def init(params: Tensors) -> NormalizeNeuronsState:
            return NormalizeNeuronsState({k: _zeros(p, blocks.get(k)) for k, p in params.items()})

        def update(
            updates: Tensors, state: NormalizeNeuronsState, params: Tensors, context: Context
        ) -> tuple[Tensors, NormalizeNeuronsState]:
            beta2 = context.hyperparameters[b2.name]
            moves, nu = {}, {}
            for k, o in updates.items():
                moves[k], nu[k] = in_blocks(lambda o, nu: normalized(o, nu, beta2), blocks.get(k), o, state.nu[k])
            return moves, NormalizeNeuronsState(nu)

        return Transform(
            init, update, Extras("normalize_neurons", by_name(b2), (SPECTRAL,), bind=built, second_moments=("nu",))
        )

    return built({})


def _zeros(p: Tensor, blocks: Blocks | None) -> Tensor:
    """nu at the start: one number a row; one a row and block if rows are cut."""
    return p.new_zeros(*p.shape[:-1], len(blocks.sizes) if blocks is not None and blocks.axis == -1 else 1)
