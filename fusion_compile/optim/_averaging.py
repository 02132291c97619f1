"""The average of the Schedule-Free transforms: the weight of a step in x, and the gradient point between z and x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, Named
from fusion_compile.optim._tree import count_like, lerp

AVERAGES = ("lr_max", "lr")


@dataclass(frozen=True)
class Averaging:
    """Options of the average, for updates counted from k = 0.

    ``w = (k + 1)^r ρ^weight_lr_power`` with ρ the largest lr so far (`average` ``"lr_max"``) or this update's own
    (``"lr"``); ``c = w / Σ w`` (0 while all w are 0), but ``c = 1`` and w does not count while ``k < c_warmup``.

    ``y = β_k x + (1 - β_k) z`` after update k, where ``ln(1 - β_k)`` goes from ``ln(1 - β)`` to ``ln(1 - β_max)`` along
    ``p = min(k / anneal, 1)``; with ``anneal=0`` it is β throughout.
    """

    beta: Named
    beta_max: Named
    anneal: int = 0
    c_warmup: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    average: str = "lr_max"

    def __post_init__(self) -> None:
        for name, steps in (("anneal", self.anneal), ("c_warmup", self.c_warmup)):
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise ValueError(f"{name}={steps!r} is not a number of updates; give a whole number, 0 for none.")
        for name, power in (("r", self.r), ("weight_lr_power", self.weight_lr_power)):
            if not 0 <= power < float("inf"):
                raise ValueError(f"{name}={power!r} is not an exponent of the average's weights; give 0 or more.")
        if self.average not in AVERAGES:
            raise ValueError(f"average={self.average!r} is not known; use one of {', '.join(map(repr, AVERAGES))}.")

    @property
    def numbers(self) -> list[Named]:
        """The live numbers."""
        return [self.beta, self.beta_max] if self.anneal else [self.beta]

    def taken(self, params: Tensors) -> Tensors:
        """``{"k": 0}`` if an option needs the number of updates taken, else empty."""
        if self.anneal or self.c_warmup or self.r:
            return {"k": count_like(params)}
        return {}

    def beta_now(self, taken: Tensors, context: Context) -> Tensor:
        """β_k of the next update; k is the number of updates taken."""
        beta = context.hyperparameters[self.beta.name]
        if not self.anneal:
            return beta
        p = (taken["k"].to(beta.dtype) / self.anneal).clamp(0, 1)
        # Powers instead of logarithms, so that nothing of the other end is left at p = 0 and p = 1.
        return 1 - (1 - beta) ** (1 - p) * (1 - context.hyperparameters[self.beta_max.name]) ** p

    def point(self, x: Tensors, z: Tensors, taken: Tensors, context: Context) -> Tensors:
        """y, with the β_k of the last update. Before the first update x = z = y."""
        beta = self.beta_now({key: k - 1 for key, k in taken.items()}, context)
        return lerp(z, x, beta)

    def move(
        self, x: Tensors, z: Tensors, lr: Tensor, lr_max: Tensor, weight_sum: Tensor, taken: Tensors
    ) -> tuple[Tensors, Tensor, Tensor, Tensors]:
        """The update of x for the new z, and `lr_max`, `weight_sum` (fp64) and `taken` after it."""
        lr_max = torch.maximum(lr_max, lr)
        rate = lr_max if self.average == "lr_max" else lr
        weight = rate * rate if self.weight_lr_power == 2 else rate**self.weight_lr_power
        if self.r:
            weight = weight * (taken["k"] + 1).to(weight.dtype) ** self.r
        counted = torch.where(taken["k"] < self.c_warmup, torch.zeros_like(weight), weight) if self.c_warmup else weight
        weight_sum = weight_sum + counted
        # At lr = 0 from the start both are zero: the average then stays where it is.
        c = torch.where(weight_sum > 0, (weight / weight_sum).to(weight.dtype), torch.zeros_like(weight))
        if self.c_warmup:
            c = torch.where(taken["k"] < self.c_warmup, torch.ones_like(c), c)
        moved = {key: c * (z[key] - value) for key, value in x.items()}
        return moved, lr_max, weight_sum, {key: k + 1 for key, k in taken.items()}
