"""The optimizer's update over banks, as pure functions of the flat state. A training step and a torch optimizer share
it.

``donated`` turns such a function into one that writes its results into the state's own tensors. Inductor compiles those
writes to in-place kernels without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._state import flat_tree, keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.half_precision import forget_lost, weights_of
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._types import Tensors
from fusion_compile.optim._rounding_noise import RoundingNoise
from fusion_compile.optim._transform import Context, State, Transform

Work = Callable[[State, Tensors, Context], State]


@dataclass(frozen=True)
class UpdatePlan:
    """What is fixed about an update: banks, the transform that knows them, its state with paths for tensors (`form`),
    the live numbers, and the noise of weights that are rounded at random. `state`, where it is an argument, is flat."""

    layout: Layout
    transform: Transform
    form: Any
    hyperparameters: Hyperparameters
    noise: RoundingNoise | None = None
    narrowed: Callable[[Tensors], Tensors] | None = None
    """With ranks that divide the state: the flat state as this rank's optimizer sees it."""

    def params(self, state: Tensors) -> Tensors:
        """The weights that the optimizer updates, by bank."""
        state = state if self.narrowed is None else self.narrowed(state)
        return {b.key: weights_of(b, state) for b in self.layout.banks}

    def optimizer(self, state: Tensors) -> State:
        """The transform's own state."""
        state = state if self.narrowed is None else self.narrowed(state)
        return flat_tree.unflatten(self.form, state)

    def context(self, state: Tensors, loss: Tensor | None = None, *, due: bool = False) -> Context:
        """What the transform may know of one step."""
        return Context(self.hyperparameters.by_name(state[keys.HYPERPARAMETERS]), loss, due)

    def gradient_point(self, state: Tensors, context: Context) -> Tensors:
        """The weights at which the loss is differentiated, by bank."""
        params, move = self.params(state), self.transform.gradient_point
        return params if move is None else move(params, self.optimizer(state), context)

    def diagnostics(self, state: Tensors) -> Tensors:
        """Copies of the diagnostics that the transform left in its state."""
        read = self.transform.diagnostics
        return {} if read is None else {k: v.clone() for k, v in read(self.optimizer(state)).items()}

    def changed(self, optimizer: State, state: Tensors) -> Tensors:
        """The flat entries of the transform's state `optimizer` that are others than those of `state`."""
        return _changed(optimizer, state)

    def fresh(self, state: Tensors) -> Tensors:
        """The entries of the transform's state as they are before the first step."""
        return dict(flat_tree.flatten(self.transform.init(self.params(state)), keys.OPTIMIZER))

    def begin_at(self, banks: Tensors, state: Tensors) -> None:
        """Put `banks` and a fresh state of the transform into `state`."""
        with torch.no_grad():
            for key, bank in banks.items():
                if keys.params(key) in state:
                    state[keys.params(key)].copy_(bank)
            forget_lost(self.layout, state, {p.name for b in self.layout.banks for p in b.places})
            for key, tensor in self.fresh(state).items():
                state[key].copy_(tensor)


class Updated(NamedTuple):
    """`new`: the entries of the flat state that changed. `updates`: what was added to the weights, by bank."""

    new: Tensors
    updates: Tensors


def pure_update(plan: UpdatePlan, state: Tensors, gradients: Tensors, context: Context) -> Updated:
    """Take one step on `gradients` (banks in the state dtype). Changes none of its arguments."""
    params = plan.params(state)
    updates, optimizer = plan.transform.update(gradients, plan.optimizer(state), params, context)
    new: Tensors = {keys.params(k): p + updates[k] for k, p in params.items()}
    return Updated({**new, **_changed(optimizer, state)}, updates)


def pure_periodic(plan: UpdatePlan, work: Work) -> Callable[[Tensors], Tensors]:
    """A transform's periodic `work` as a pure function of the flat state that returns the changed entries.

    After a step that was skipped nothing changes, where the state knows of skipped steps.
    """

    def refresh(state: Tensors) -> Tensors:
        state = state if plan.narrowed is None else plan.narrowed(state)  # once: what did not change is the same tensor
        with _compat.region("optimizer"):
            after = work(plan.optimizer(state), plan.params(state), plan.context(state))
            changed, taken = _changed(after, state), state.get(keys.TAKEN)
            if taken is None:
                return settled(changed, state)
            return {k: torch.where(taken, t, state[k]) for k, t in changed.items()}

    return refresh


def _changed(optimizer: State, state: Tensors) -> Tensors:
    # A tensor that a transform returns as it was (a basis that its periodic work renews) must not be written.
    return {k: t for k, t in flat_tree.flatten(optimizer, keys.OPTIMIZER) if t is not state[k]}


def settled(new: Tensors, state: Tensors) -> Tensors:
    """`new`, so that it may be written into `state` in whatever order.

    A transform may hand over a tensor of the state untouched (``prev2 ← prev``, a swap), a metric may show a weight.
    Written one after another, the second write would read what the first has changed. A clone does not help: Inductor
    drops it, and is wrong for ``a[:] = b; b.add_(1)``. A select whose condition only the run knows cannot be dropped,
    and fuses into the kernel that computes the value. It is bitwise.
    """
    always = ~(state[keys.HYPERPARAMETERS].abs().sum() < 0)
    alike = {k for k, t in new.items() if k in state and is_alike(t, state[k])}
    return {k: torch.where(always, t, state[k]) if k in alike else t for k, t in new.items()}


_MAY_GROW = (keys.CARRIED, keys.BUFFERS)
"""Sections of the state that user code may replace by tensors of another size."""


def donated(pure: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """`pure` (of the state and further arguments) with its results written into the state's own tensors.

    Returns the results for which the state has no tensor yet, or, of what user code keeps and of buffers, none of their
    shape and dtype; they are not written.
    """

    # A captured program's inputs are called by these two names (`Program.input_names`).
    def in_place(state: Tensors, *batch: Any) -> Tensors:
        fresh: Tensors = {}
        with torch.no_grad():
            new = pure(state, *batch)
            _refuse_misfits(new, state)
            for key, value in new.items():
                old = state.get(key)
                if old is None or (keys.split(key)[0] in _MAY_GROW and not is_alike(old, value)):
                    fresh[key] = value
                else:
                    _compat.write(old, value)
        return fresh

    return in_place


def _refuse_misfits(new: Tensors, state: Tensors) -> None:
    """Raise ValueError for a result of another shape than its place, before the first one is written."""
    for key, value in new.items():
        section, name = keys.split(key)
        if key in state and section not in _MAY_GROW and value.shape != state[key].shape:
            raise ValueError(
                f"{name} ({section}) is {list(value.shape)} after this step and {list(state[key].shape)} before it; "
                f"nothing was changed. What a step keeps has one shape."
            )


def is_alike(a: Tensor, b: Tensor) -> bool:
    """Whether one tensor can be written into the other's place without a change of shape or dtype."""
    return a.shape == b.shape and a.dtype == b.dtype
