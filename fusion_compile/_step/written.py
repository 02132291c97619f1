"""Weights that a forward writes itself: EDM2's forced normalization, nGPT's unit matrices, a clamp on a temperature.

In the ordinary loop such a write stays in the parameter, and the optimizer steps from there. Here the loss sees the
weights at the gradient point, so the written point is carried back to the parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._step.update import UpdatePlan
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context


class Written(NamedTuple):
    """A weight in the module's dtype, as the loss was given it and as it left it."""

    before: Tensor
    after: Tensor


def with_written_point(
    plan: UpdatePlan,
    state: Tensors,
    point: Tensors,
    written: Mapping[str, Written],
    context: Context,
    first: Tensor | None = None,
) -> Tensors:
    """`state` with parameters whose gradient point is `point` where the forward left it alone, and `written` elsewhere.

    Under Schedule-Free, y = β x + (1 - β) z: x moves by the write over β and z stays, as in an optimizer that keeps y
    and z (``schedulefree``). Before the `first` step nothing has moved, and an optimizer of torch makes its state of
    the weights that it finds then: what the forward wrote is the start. Changes none of its arguments.

    Args:
        plan: What is fixed about the update.
        state: The flat state.
        point: The gradient point by bank, before the forward.
        written: By full name, the parameters that the forward writes.
        context: Of the step.
        first: Whether this is the first step, as a 0-dim bool; None where the optimizer has begun.
    """
    moved: Tensors = {}
    for bank in plan.layout.banks:
        if not any(place.name in written for place in bank.places):
            continue
        parts = [
            _adopted(view, written[place.name]) if place.name in written else view
            for place, view in zip(bank.places, bank.split(point[bank.key]), strict=True)
        ]
        moved[bank.key] = bank.join(parts, point[bank.key].dtype)
    begun = {} if first is None else _begun(plan, state, moved, first)
    if plan.transform.gradient_point is None:
        return {**state, **begun, **{keys.params(key): value for key, value in moved.items()}}
    slope = _slopes(plan, state, context)
    params = plan.params(state)
    for key, there in moved.items():
        shift = (there - point[key]) / torch.where(slope[key] == 0, torch.ones_like(slope[key]), slope[key])
        follows = params[key] + shift
        moved[key] = follows if first is None else torch.where(first & (params[key] == point[key]), there, follows)
    return {**state, **begun, **{keys.params(key): value for key, value in moved.items()}}


def _begun(plan: UpdatePlan, state: Tensors, moved: Tensors, first: Tensor) -> Tensors:
    """What the optimizer keeps as it would be if it began at the weights `moved`, where it is the `first` step and an
    entry is what it was made of the weights (z, first weights). What a warm start brought stays."""
    then = {**state, **{keys.params(key): value for key, value in moved.items()}}
    made, anew = plan.fresh(state), plan.fresh(then)
    return {
        key: torch.where(first & (state[key] == made[key]), anew[key], state[key])
        for key in made
        if made[key].ndim and made[key].is_floating_point()
    }


def _adopted(at: Tensor, written: Written) -> Tensor:
    """`at`, except where the forward left another number than it was given."""
    return torch.where(written.after == written.before, at, written.after.to(at.dtype))


def _slopes(plan: UpdatePlan, state: Tensors, context: Context) -> Tensors:
    """How far the gradient point moves where a parameter moves by 1: β. A power of two keeps the difference exact to a
    rounding of the weights."""
    far = {keys.params(key): value + 1 for key, value in plan.params(state).items()}
    here, there = plan.gradient_point(state, context), plan.gradient_point({**state, **far}, context)
    return {key: there[key] - here[key] for key in here}


def refuse_other_points(plan: UpdatePlan, state: Tensors, written: Collection[str]) -> None:
    """Raise ValueError if a forward writes weights and the transform's gradient point cannot be led back to them.

    Reads numbers on the CPU: call it when a step is compiled. `written`: full names.
    """
    if not written or plan.transform.gradient_point is None:
        return
    with torch.no_grad():
        context = plan.context(state)
        one = _slopes(plan, state, context)
        far = {keys.params(key): value + 1 for key, value in plan.params(state).items()}
        two = _slopes(plan, {**state, **far}, context)
        for key, slope in one.items():
            # Each is a difference of two numbers of about the size of a weight plus 2.
            size = float(plan.params(state)[key].abs().max()) + 2
            room = 16 * torch.finfo(slope.dtype).eps * size
            if float(slope.abs().min()) < 1e-3 or float((slope - two[key]).abs().max()) > room:
                name = next(p.name for b in plan.layout.banks if b.key == key for p in b.places)
                raise ValueError(
                    f"the forward writes {sorted(written)[0]}, and {plan.transform.name} differentiates at a point "
                    f"that does not follow the weights in a straight line (as Schedule-Free's does, β above 0): the "
                    f"write has no counterpart in {name} and the others. Write the weights between steps instead."
                )


def refuse_rebound(rebound: Collection[str]) -> None:
    """Raise ValueError if a forward that is to be captured puts another tensor into a parameter. `rebound`: full
    names."""
    if rebound:
        raise ValueError(
            f"the forward puts another tensor into {sorted(rebound)[0]} (parameter.data = …), which a captured program "
            f"does not follow. Write into it, parameter.data.copy_(…), or run the step with mode='eager'."
        )
