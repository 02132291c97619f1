"""The gradient of a loss as the ordinary loop finds it in ``.grad``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of leaves.

    Attributes:
        found: One for each leaf; None where the loss does not depend on it.
        accumulated: Whether another backward than the step's own added to some.
    """

    found: tuple[Tensor | None, ...]
    accumulated: bool


def gradients(
    loss: Tensor, leaves: Sequence[Tensor], *, divided: bool = False, also: Sequence[Tensor] = ()
) -> Gradients:
    """The gradient of `loss`, and what other backwards have added to ``.grad``.

    Others are a backward inside of the loss, and one inside of the backward of a custom function (reversible layers).
    They add to ``.grad`` of their leaves, which ``torch.autograd.grad`` does not look at, and `loss.backward()` adds
    its own. The leaves have no ``.grad`` afterwards.

    Args:
        loss: 0-dim.
        leaves: What stands for the parameters. Their ``.grad`` was None before the forward.
        also: Other leaves (a discriminator that the loss trains itself), to whose ``.grad`` `loss.backward()` adds.
        divided: Whether the gradient is divided afterwards, as those of micro-batches and of a scaled loss are.

    Raises:
        ValueError: `divided`, and a backward inside of the loss has added something, which nobody divides.
    """
    if divided and any(leaf.grad is not None for leaf in leaves):
        raise ValueError(
            "a backward inside of the loss adds to the parameters' .grad, which the mean over micro-batches "
            "(accumulate) or the scale of an fp16 loss would divide and the ordinary loop does not. Take that gradient "
            "with torch.autograd.grad, or leave accumulate out (loss_scale=False)."
        )
    own = torch.autograd.grad(loss, [*leaves, *also], allow_unused=True)
    for leaf, gradient in zip(also, own[len(leaves) :], strict=True):
        if gradient is not None:
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    others = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    found = (a if b is None else b if a is None else a + b for a, b in zip(own[: len(leaves)], others, strict=True))
    return Gradients(tuple(found), any(other is not None for other in others))
