"""Parameters that the loss reads in some steps and not in others: refused, or left alone where each has counts of its
own (`leave_unread`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._state.banks import Bank, Layout
from fusion_compile._step.options import StepOptions
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Transform
from fusion_compile.optim.averaged import Average

REMEDY = (
    "Give optimizer=fusion_compile.optim.leave_unread(…) the optimizer, which leaves such a parameter alone as "
    "torch.optim does"
)


def refuse_left_alone(transform: Transform, options: StepOptions, *, several_ranks: bool) -> None:
    """Raise ValueError for a step that is to leave parameters alone where that is not known to be right."""
    if not transform.extras.leaves_unread:
        return
    if several_ranks:
        raise ValueError(
            "leave_unread() with mesh=…: ranks may read different parameters. Leave one of the two out, or multiply a "
            "part by 0 instead of leaving it out."
        )
    if options.keep_gradients:
        raise ValueError(
            "leave_unread() with keep_gradients=True: what .grad shows of a parameter without a gradient would be "
            "zero. Leave one of the two out."
        )


def refuse_other_unread(unread: Sequence[str], at_first: Sequence[str]) -> None:
    """Raise ValueError if the loss now reads other parameters than at first: their gradient is none, not zero."""
    if odd := sorted({*unread} ^ {*at_first}):
        now, then = ("does not read", "read") if odd[0] in unread else ("reads", "did not read")
        raise ValueError(
            f"the loss {now} {odd[0]} in this step, but {then} it before. torch.optim skips a parameter without a "
            f"gradient and counts its steps by itself. {REMEDY}, or multiply the part by 0 or 1 (a 0-dim tensor of the "
            f"batch) instead of leaving it out."
        )


def left_alone(
    layout: Layout, new: Tensors, state: Tensors, unread: Collection[str], averages: Sequence[Average]
) -> Tensors:
    """`new` without what it has of parameters that are `unread`, which stay as in `state`. Averages of the weights
    move all the same."""
    banks = {bank.key: bank for bank in layout.banks}
    moving = {keys.optimizer(f"averages/{a.name}/{key}") for a in averages for key in banks}
    found: Tensors = {}
    for key, tensor in new.items():
        bank = banks.get(layout.bank_of(key) or "") if key not in moving else None
        kept = tensor if bank is None else where_read(bank, tensor, state[key], unread)
        if kept is not state[key]:
            found[key] = kept
    return found


def moving(layout: Layout, updates: Tensors, unread: Collection[str]) -> Tensors:
    """`updates`, by bank, with zeros for what stays."""
    return {b.key: where_read(b, updates[b.key], torch.zeros_like(updates[b.key]), unread) for b in layout.banks}


def where_read(bank: Bank, new: Tensor, old: Tensor, unread: Collection[str]) -> Tensor:
    """`new` for parameters that are read, and `old` for those that are not. Both have the form of `bank`, with one
    entry for every so many of its own. What is chosen is known when the step is captured, so nothing is compared."""
    each = bank.length // max(1, new.shape[0])
    bounds = [place.at // each for place in bank.places] + [new.shape[0]]
    runs: list[tuple[bool, int, int]] = []
    for place, begin, end in zip(bank.places, bounds, bounds[1:], strict=False):
        read = place.name not in unread
        if runs and runs[-1][0] is read:
            runs[-1] = (read, runs[-1][1], end)
        else:
            runs.append((read, begin, end))
    if len(runs) == 1:
        return new if runs[0][0] else old
    return torch.cat([(new if read else old)[begin:end] for read, begin, end in runs])


def present(layout: Layout, unread: Collection[str]) -> Tensors | None:
    """By bank, which of its entries or matrices move; None for all."""
    if not unread:
        return None
    masks = {b.key: torch.ones(b.length, dtype=torch.bool, device=layout.device) for b in layout.banks}
    return {b.key: where_read(b, masks[b.key], ~masks[b.key], unread) for b in layout.banks}
