"""The optimizer's update alone as one program: gradients of several parameter groups in, all state updated in place.

Gradients are joined to banks outside the program. It then has as many inputs, guards and nodes for 1000 parameters as
for 10, and a CUDA graph, into whose inputs gradients from ever new addresses are copied, copies banks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._program.lower import resolve_mode
from fusion_compile._program.programs import Programs
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.half_precision import counted, packed, unpacked
from fusion_compile._state.masters import rounded, with_written_weights
from fusion_compile._step.periodic import run_due_work
from fusion_compile._step.update import UpdatePlan, donated, pure_update, settled
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._types import Tensors
from fusion_compile.optim.averaged import follow


class Turn(NamedTuple):
    """One group's part in a step. `due`: see ``Transform.period``. `partial`: some parameters have no gradient. `idle`:
    none has one, and only the averages of its weights move."""

    at: int
    due: bool
    partial: bool
    idle: bool = False


class Signature(NamedTuple):
    """The key of an update's program: the groups that have gradients, and whether there is a loss."""

    turns: tuple[Turn, ...]
    with_loss: bool


class Arrivals(NamedTuple):
    """New inputs of one step. `gradients`, `present`: by ``<group>/<bank>``; `present` for partial turns only."""

    gradients: Tensors
    present: Tensors
    loss: Tensor | None


def as_minimized(loss: Any, uphill: Collection[bool], layout: Layout) -> Tensor | None:
    """The loss of a step as a number in the state's dtype, with the other sign where groups go `uphill`."""
    if loss is None:
        return None
    if len({*uphill}) > 1:
        raise ValueError("a step with a loss has groups with maximize and groups without; take two optimizers.")
    loss = -loss if True in uphill else loss
    return torch.as_tensor(loss, device=layout.device).detach().to(layout.state_dtype).reshape(())


def pure_updates(groups: Mapping[int, ParameterGroup], signature: Signature) -> Callable[[Tensors, Arrivals], Tensors]:
    """The update of all groups as a function that changes none of its arguments and returns the new values by key."""

    def advance(state: Tensors, given: Arrivals) -> Tensors:
        new: Tensors = {}
        for turn in signature.turns:
            own = keys.without_group(turn.at, state)
            new |= keys.of_group(turn.at, _update_of(groups[turn.at], turn, own, given))
        return new

    return advance


def _update_of(group: ParameterGroup, turn: Turn, state: Tensors, given: Arrivals) -> Tensors:
    if not turn.idle:
        return update_of(group.plan, turn, state, given, group.averaged)
    plan = group.plan
    state = unpacked(plan.layout, state if group.moves else with_written_weights(plan.layout, state))
    context = plan.context(state)
    return plan.changed(follow(group.averages, plan.optimizer(state), plan.params(state), context), state)


def update_of(plan: UpdatePlan, turn: Turn, state: Tensors, given: Arrivals, averaged: Collection[str] = ()) -> Tensors:
    """The new values of one group by its own keys. `averaged`: of those, averages of the weights."""
    layout, moves = plan.layout, plan.transform.gradient_point is not None
    as_kept = state if moves else with_written_weights(layout, state)
    state = unpacked(layout, as_kept)
    arrived = keys.without_group(turn.at, given.gradients)
    gradients = {b.key: arrived[b.key].to(layout.state_dtype) for b in layout.banks}
    present = keys.without_group(turn.at, given.present) if turn.partial else None
    context = plan.context(state, given.loss, due=turn.due)._replace(present=present)
    new, _ = pure_update(plan, state, gradients, context)
    new |= counted(state)
    if present is not None:  # the average of a weight moves towards it also where the weight stays
        masks = {key: None if key in averaged else present.get(layout.bank_of(key) or "") for key in new}
        new = {key: _where_present(value, state[key], masks[key]) for key, value in new.items()}
    new = settled(new, state)
    if moves:
        return new | rounded(layout, plan.gradient_point({**state, **new}, context), state)
    return packed(layout, new, state, as_kept, plan.noise)


def _where_present(new: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
    """`new` for parameters that have a gradient and `old` for the rest. State that no parameter owns is `new`."""
    if mask is None or not new.ndim:
        return new
    if new.shape[:1] != mask.shape:
        mask = mask[:: mask.shape[0] // new.shape[0]]  # of a flat bank, one number for every so many entries
    return torch.where(mask.view(-1, *[1] * (new.ndim - 1)), new, old)


class UpdatePrograms:
    """Compile updates, each once, and run them. `mode`, `backend`: see `as_torch_optimizer`."""

    def __init__(self, mode: str | None, backend: str) -> None:
        resolve_mode(mode, torch.device("cpu"))  # refuse a wrong name now, not at the first step
        if not isinstance(backend, str):
            raise TypeError(f"backend={backend!r} is not a name; give a torch.compile backend's, 'inductor'.")
        self.mode, self.backend = mode, backend
        self._programs = Programs(backend)

    def __len__(self) -> int:
        return len(self._programs)

    def forget(self) -> None:
        """Drop all programs with their graphs: a group was built again, and its banks are other tensors."""
        self._programs = Programs(self.backend)

    def step(self, groups: Mapping[int, ParameterGroup], signature: Signature, given: Arrivals) -> None:
        """Take one update of the groups in `signature`."""
        device = next(iter(groups.values())).layout.device
        state = {k: t for turn in signature.turns for k, t in groups[turn.at].shared_state.items()}
        with outside_autocast(device):
            if self._programs.rerun(signature, state, given):
                return
            if given.loss is None:
                refuse_missing_loss([(groups[t.at], t.due) for t in signature.turns])
            update, mode = donated(pure_updates(groups, signature)), resolve_mode(self.mode, device, self.backend)
            self._programs.compile(signature, update, state, given, mode=mode, what="the optimizer's update")

    def after_step(self, group: ParameterGroup, steps: int) -> None:
        """Run the periodic work that is due when `group` has taken `steps` steps (see `Periodic`)."""
        if not group.transform.periodic:
            return
        device = group.layout.device
        with outside_autocast(device):
            mode = resolve_mode(self.mode, device, self.backend)
            first = steps == 1
            run_due_work(group.plan, steps, group.state, self._programs, mode=mode, owner=group.at, first=first)


@contextlib.contextmanager
def outside_autocast(device: torch.device) -> Iterator[None]:
    # Inside a caller's autocast Newton-Schulz would run in another dtype, and another program.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def refuse_missing_loss(groups: Sequence[tuple[ParameterGroup, bool]]) -> None:
    """Raise RuntimeError where a transform's update needs the loss, found by a run on tensors without data."""

    def fails(group: ParameterGroup, due: bool, loss: Tensor | None) -> Exception | None:
        state = {k: torch.empty_like(t, device="meta") for k, t in group.state.items()}
        context = group.plan.context(state, loss, due=due)
        try:
            pure_update(group.plan, state, group.plan.params(state), context)
        except Exception as error:
            return error
        return None

    for group, due in groups:
        error = fails(group, due, None)
        loss = torch.empty((), dtype=group.layout.state_dtype, device="meta")
        if error is not None and fails(group, due, loss) is None:
            raise RuntimeError(
                f"{group.transform.name} cannot take a step without the loss. Call optimizer.step(closure) with a "
                f"closure that returns it, or optimizer.set_loss(loss) before optimizer.step()."
            ) from error
