"""Exponential moving averages of the weights, in the kernels that update them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import wrap
from fusion_compile.optim._transform import Context, State, Transform, check_transform
from fusion_compile.optim._tree import copy, count_like, lerp


class Average(NamedTuple):
    """How one average follows the weights: ``a ← a + w (weights - a)`` in update n = 1, 2, ….

    Attributes:
        name: Of its tensors in checkpoints.
        rate: 1 - decay, the least w; live under the name `number`. In fp32 a decay of 0.99999 is wrong by 0.3 % of its
            distance from 1, and this is not.
        warmup: What w is at least, with ``s = n - after - 1``: ``"ramp"`` ``9 / (10 + s)``; ``"power"``
            ``(1 + s / inv_gamma)^-power``; ``"profile"`` ``1 - (1 - 1/n)^(gamma + 1)``; None nothing.
        min_decay: Where s > 0, w is at most 1 - min_decay.
        after: Up to this update, and in the first one of a warm-up, the average is a copy of the weights.
        every: Only updates whose n it divides move the average.
    """

    name: str = "ema"
    rate: float = 1e-4
    warmup: str | None = None
    inv_gamma: float = 1.0
    power: float = 2 / 3
    gamma: float = 0.0
    min_decay: float = 0.0
    after: int = 0
    every: int = 1

    @property
    def number(self) -> str:
        """The name of its live number; empty where it has none."""
        if self.warmup == "profile":
            return ""
        return "ema_rate" if self.name == "ema" else f"{self.name}_ema_rate"  # its range is that of every "ema_rate"

    def least(self, n: Tensor) -> Tensor:
        """The least w of one update.

        Args:
            n: The update's number, 0-dim int64.

        Returns:
            0-dim fp32; below 0 where the update leaves the average alone.
        """
        s = (n - (self.after + 1)).float()
        if self.warmup == "ramp":
            w = 9 / (10 + s)
        elif self.warmup == "power":
            w = (1 + s.clamp(min=0) / self.inv_gamma) ** -self.power
        elif self.warmup == "profile":
            w = -torch.expm1((self.gamma + 1) * torch.log1p(-1 / n.float()))
        else:
            w = torch.zeros_like(s)
        if self.min_decay:
            w = w.clamp(max=1 - self.min_decay)
        if self.after or self.warmup in ("ramp", "power"):
            w = torch.where(s <= 0, torch.ones_like(w), w)
        return w if self.every == 1 else torch.where(n % self.every == 0, w, -torch.ones_like(w))


class AveragedState(NamedTuple):
    """`averages`: by name, shaped like the parameters; `least`: by name, the least weight in the next update, 0-dim;
    `taken`: updates so far, 0-dim; `base`: the wrapped transform's state."""

    averages: dict[str, Tensors]
    least: Tensors
    taken: Tensor
    base: State


def follow(averages: Sequence[Average], state: AveragedState, weights: Tensors, context: Context) -> AveragedState:
    """`state` after one update of the averages towards `weights`."""
    kept = {}
    for average in averages:
        least = state.least[average.name]
        rate = context.hyperparameters[average.number] if average.number else torch.zeros_like(least)
        w = torch.where(least < 0, torch.zeros_like(least), torch.maximum(least, rate.to(least.dtype)))
        kept[average.name] = lerp(state.averages[average.name], weights, w)
    count = state.taken + 1
    return AveragedState(kept, {a.name: a.least(count + 1) for a in averages}, count, state.base)


def _that_move(moves: Tensor, key: str, context: Context) -> Tensor:
    """`moves` of one bank, zero for what stays in this step."""
    mask = None if context.present is None else context.present.get(key)
    if mask is None:
        return moves
    return torch.where(mask.view(-1, *[1] * (moves.ndim - 1)), moves, torch.zeros_like(moves))


def averaged(base: Transform, averages: Sequence[Average]) -> Transform:
    """`base`, and averages of the weights that it leaves, ``params + base(g)``.

    Under Schedule-Free these are the deployed weights x. Any shape, entry by entry; 4 bytes a parameter for each
    average. The weights of a warm-up are computed for the next update and kept: within the loop over entries a power
    would be computed for every vector of them.
    Source: ``torch.optim.swa_utils``, ``diffusers.training_utils.EMAModel``, ``timm.utils.ModelEmaV3``,
    ``ema_pytorch``; the profile is EDM2's (2312.02696, equation 127). Deviations: none up to rounding.

    Args:
        base: Any transform.
        averages: One or more, with different names.

    Returns:
        A transform with the roles, numbers and step of `base`.

    Raises:
        ValueError: Two averages have one name, or none is given.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.averaged(optim.adamw(1e-3), [optim.Average(rate=1e-3)])
        >>> optimizer.hyperparameters["ema_rate"]
        0.001
    """
    check_transform("averaged(), base,", base)
    names = [average.name for average in averages]
    if not names or len({*names}) < len(names):
        raise ValueError(f"averaged() was given the averages {names}; give at least one, each with a name of its own.")

    def init(params: Tensors) -> AveragedState:
        count = count_like(params)
        kept = {average.name: copy(params) for average in averages}
        return AveragedState(kept, {a.name: a.least(count + 1) for a in averages}, count, base.init(params))

    def update(
        updates: Tensors, state: AveragedState, params: Tensors, context: Context
    ) -> tuple[Tensors, AveragedState]:
        moves, base_state = base.update(updates, state.base, params, context)
        weights = {key: p + _that_move(moves[key], key, context) for key, p in params.items()}
        return moves, follow(averages, state, weights, context)._replace(base=base_state)

    numbers = {average.number: average.rate for average in averages if average.number}
    extras = wrap(base, base.name, numbers, rebuild=lambda base: averaged(base, averages))
    return Transform(init, update, extras._replace(leaves_unread=base.extras.leaves_unread))
