"""The optimizer's update alone as one program: gradients of several parameter groups in, all state updated in place.

Gradients come as banks that were joined outside the program: there are as many of its inputs, guards and nodes for 1000
parameters as for 10, and a CUDA graph, to whose inputs gradients at ever new addresses are copied, copies banks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._program.lower import lower, no_recompile, resolve_mode, without_cuda_graph
from fusion_compile._progress import stage
from fusion_compile._state import flat_tree
from fusion_compile._step.pure_step import donated
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, State

Work = Callable[[State, Tensors, Context], State]


class Turn(NamedTuple):
    """What one group does in a step. `due`: see ``Transform.period``. `partial`: some parameters have no gradient."""

    at: int
    due: bool
    partial: bool


class Signature(NamedTuple):
    """What makes one update another program: the groups that have gradients, and whether there is a loss."""

    turns: tuple[Turn, ...]
    with_loss: bool


class Arrivals(NamedTuple):
    """What a step is given anew. `gradients`, `present`: by ``<group>/<bank>``; `present` for partial turns only."""

    gradients: Tensors
    present: Tensors
    loss: Tensor | None


def pure_update(groups: Mapping[int, ParameterGroup], signature: Signature) -> Callable[[Tensors, Arrivals], Tensors]:
    """The update of all groups as a function that changes none of its arguments and returns the new values by key."""

    def one(group: ParameterGroup, turn: Turn, state: Tensors, given: Arrivals) -> Tensors:
        at, layout, transform = group.at, group.layout, group.transform
        params = {}
        for b in layout.banks:
            weights = state[f"{at}/params/{b.key}"]
            if b.dtype != layout.state_dtype and not group.moves:
                # Where the model does not hold its master's rounding, somebody wrote there since the last step.
                shown = state[f"{at}/module/{b.key}"]
                weights = torch.where(weights.to(b.dtype) == shown, weights, shown.to(weights.dtype))
            params[b.key] = weights
        gradients = {b.key: given.gradients[f"{at}/{b.key}"].to(layout.state_dtype) for b in layout.banks}
        context = Context(group.numbers(state), given.loss, turn.due)
        updates, optimizer = transform.update(gradients, group.optimizer(state), params, context)
        new = {f"{at}/params/{k}": p + updates[k] for k, p in params.items()}
        new.update(flat_tree.flatten(optimizer, f"{at}/optimizer"))
        if turn.partial:
            for key, value in new.items():
                bank = group.bank_of(key)
                mask = None if bank is None else given.present[f"{at}/{bank}"]
                if bank is not None and mask is not None and value.shape[:1] == mask.shape:
                    old = params[bank] if key == f"{at}/params/{bank}" else state[key]
                    new[key] = torch.where(mask.view(-1, *[1] * (value.ndim - 1)), value, old)
        point = {b.key: new[f"{at}/params/{b.key}"] for b in layout.banks}
        if transform.gradient_point is not None:
            point = transform.gradient_point(point, flat_tree.unflatten(group.form, new), context)
        for b in layout.banks:
            if group.apart(b):
                new[f"{at}/module/{b.key}"] = point[b.key].to(b.dtype)
        # What a transform hands back untouched (a basis that its periodic work renews) is not written.
        return {k: t for k, t in new.items() if t is not state[k]}

    def advance(state: Tensors, given: Arrivals) -> Tensors:
        new: Tensors = {}
        for turn in signature.turns:
            new.update(one(groups[turn.at], turn, state, given))
        return new

    return advance


def pure_work(group: ParameterGroup, work: Work) -> Callable[[Tensors], Tensors]:
    """A transform's periodic `work` as a pure function of the flat state."""

    def refresh(state: Tensors) -> Tensors:
        params = {b.key: state[f"{group.at}/params/{b.key}"] for b in group.layout.banks}
        after = work(group.optimizer(state), params, Context(group.numbers(state)))
        return {k: t for k, t in flat_tree.flatten(after, f"{group.at}/optimizer") if t is not state[k]}

    return refresh


class UpdatePrograms:
    """Compiles updates, each once, and runs them. `mode`, `backend`: see `as_torch_optimizer`."""

    def __init__(self, mode: str | None, backend: str) -> None:
        resolve_mode(mode, torch.device("cpu"))  # a wrong name is refused now, not at the first step
        self.mode, self.backend = mode, backend
        self._compiled: dict[Any, Callable[..., None]] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def forget(self) -> None:
        """A group was made anew: its banks are other tensors."""
        self._compiled.clear()

    def step(self, groups: Mapping[int, ParameterGroup], signature: Signature, given: Arrivals) -> None:
        """One update of the groups in `signature`."""
        device = next(iter(groups.values())).layout.device
        if given.loss is None and signature not in self._compiled:
            refuse_missing_loss([(groups[t.at], t.due) for t in signature.turns])
        state = {k: t for turn in signature.turns for k, t in groups[turn.at].state.items()}
        mode = resolve_mode(self.mode, device)
        self._run(
            signature, "the optimizer's update", lambda: pure_update(groups, signature), mode, device, state, given
        )

    def after_step(self, group: ParameterGroup, steps: int) -> None:
        """The periodic work that is due when `group` has taken `steps` steps (see `Periodic`)."""
        device = group.layout.device
        for i, periodic in enumerate(group.transform.periodic):
            if steps == 1 and periodic.first is not None:
                donated(pure_work(group, periodic.first))(group.state)
            elif periodic.is_due(steps):
                mode, work = without_cuda_graph(resolve_mode(self.mode, device)), periodic.update
                key = (group.at, i)
                self._run(key, periodic.name, lambda work=work: pure_work(group, work), mode, device, group.state)  # type: ignore[misc]

    def _run(
        self,
        key: Any,
        what: str,
        make: Callable[[], Callable[..., Tensors]],
        mode: str,
        device: torch.device,
        *args: Any,
    ) -> None:
        # Inside a caller's autocast Newton-Schulz would run in another dtype, and another program.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if (run := self._compiled.get(key)) is not None:
                with no_recompile():
                    run(*args)
                return
            run = lower(_compat.own_code(donated(make())), mode=mode, backend=self.backend)
            with stage(f"compiling {what} ({mode if self.backend == 'inductor' else self.backend})"):
                run(*args)
            self._compiled[key] = run


def refuse_missing_loss(groups: Sequence[tuple[ParameterGroup, bool]]) -> None:
    """RuntimeError where a transform's update cannot do without the loss; found out on tensors that hold nothing."""

    def fails(group: ParameterGroup, due: bool, loss: Tensor | None) -> Exception | None:
        state = {k: torch.empty_like(t, device="meta") for k, t in group.state.items()}
        params = {b.key: state[f"{group.at}/params/{b.key}"] for b in group.layout.banks}
        context = Context(group.numbers(state), loss, due)
        try:
            group.transform.update(dict(params), group.optimizer(state), params, context)
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
