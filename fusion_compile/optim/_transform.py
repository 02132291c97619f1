"""What an optimizer is made of: a pair of pure functions and the numbers it lets the user change.

A `Transform` maps gradients to updates that are *added* to the parameters. It sees banks
(``fusion_compile._state.banks``): ``{"spectral/384x1536": [K, m, n], "scalar": [N]}``. It is written for matrices
``[..., m, n]`` or for any shape, and cannot tell a bank from one tensor. `chain` joins transforms, `partition` spreads
them over roles (``_combine``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule

State: TypeAlias = Any
"""A NamedTuple (or tuple) of tensors and of dictionaries keyed like the parameters; each transform names its own."""

ELEMENTWISE = "scalar"
"""Role of parameters that are updated element by element (flat banks)."""
SPECTRAL = "spectral"
"""Role of matrices on the spectral path (stacked banks ``[K, m, n]``)."""


class Named(NamedTuple):
    """A hyperparameter under a name of its own, for when two parts of an optimizer must differ: ``Named("scalar_lr",
    3e-4)``."""

    name: str
    value: float | Schedule


Scalar: TypeAlias = float | Schedule | Named
"""What a factory accepts for a live number."""


class Context(NamedTuple):
    """What one step knows besides gradients and parameters.

    `hyperparameters`: 0-dim tensors by name, on the parameters' device. `loss`: 0-dim, the loss at the gradient point
    (for step sizes that depend on it), or None where no loss exists. `due`: whether this is one of the steps that a
    transform's `period` singles out; a Python bool, so that each of the two kinds of step is a program of its own.
    """

    hyperparameters: Mapping[str, Tensor]
    loss: Tensor | None = None
    due: bool = False


class Member(NamedTuple):
    """One parameter of a bank: its full name, its shape, and at which index (or offset, in a flat bank) it lies."""

    name: str
    shape: tuple[int, ...]
    at: int


class Blocks(NamedTuple):
    """Sizes of the blocks into which every matrix of a bank falls: along its rows (`axis` -2) or columns (-1)."""

    sizes: tuple[int, ...]
    axis: int = -2


class BankFacts(NamedTuple):
    """What a transform may know of a bank besides its tensors: whose they are, and how the matrices are divided."""

    members: tuple[Member, ...]
    blocks: Blocks | None = None


Facts: TypeAlias = Mapping[str, BankFacts]
"""By bank key."""


class Periodic(NamedTuple):
    """Work on the state that is too dear for every step: a second program, run after steps 1, 1 + `every`, 1 + 2
    `every`, … (as the official codes of SOAP and KL-Shampoo count).

    ``update(state, params, context) -> state``, pure; it is compiled for itself and without a CUDA graph. `first`,
    where given, runs in its place, uncompiled, after the very first step (it may use what cannot be captured).
    """

    name: str
    every: int
    update: Callable[[State, Tensors, Context], State]
    first: Callable[[State, Tensors, Context], State] | None = None

    def is_due(self, steps: int) -> bool:
        """Whether it runs when `steps` steps have been taken."""
        return (steps - 1) % self.every == 0


class EmptyState(NamedTuple):
    """The state of a transform that keeps nothing."""


class Transform(NamedTuple):
    """Pure functions, the default hyperparameters, and the roles the transform wants parameters to have.

    ``init(params) -> state``; ``update(updates, state, params, context) -> (updates, state)``; neither changes its
    arguments. `roles`: empty when any parameter will do. ``gradient_point(params, state, context) -> params`` gives
    the weights at which the loss is differentiated where they are not the parameters themselves (Schedule-Free's y).

    ``diagnostics(state) -> {name: 0-dim tensor}`` reads what `update` left in the state for people to see. `periodic`:
    see `Periodic`. `period`: every `period`-th step, the first included, runs with ``context.due`` (0: none does).
    ``bind(facts) -> Transform`` gives the same transform once it is known which parameters the banks hold; the form of
    its state may depend on it, so it is called before `init`.
    """

    init: Callable[[Tensors], State]
    update: Callable[[Tensors, State, Tensors, Context], tuple[Tensors, State]]
    hyperparameters: Mapping[str, float | Schedule]
    roles: tuple[str, ...] = ()
    gradient_point: Callable[[Tensors, State, Context], Tensors] | None = None
    name: str = ""
    diagnostics: Callable[[State], Mapping[str, Tensor]] | None = None
    periodic: tuple[Periodic, ...] = ()
    period: int = 0
    bind: Callable[[Facts], Transform] | None = None


def bound(transform: Transform, facts: Facts) -> Transform:
    """`transform` with its banks known; itself where it does not ask."""
    return transform if transform.bind is None else transform.bind(facts)


def declare(default_name: str, value: Scalar) -> Named:
    """`value` with its name: its own if it is `Named`, else `default_name`."""
    if isinstance(value, Named):
        return value
    return Named(default_name, value)


def stateless(
    update: Callable[[Tensors, Tensors, Context], Tensors], hyperparameters: Mapping[str, float | Schedule], name: str
) -> Transform:
    """A transform from a function of ``(updates, params, context)`` alone."""

    def init(params: Tensors) -> EmptyState:
        return EmptyState()

    def update_fn(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        return update(updates, params, context), state

    return Transform(init, update_fn, hyperparameters, name=name)


def ones_like_scalar(params: Tensors) -> Tensor:
    """A 0-dim one on the parameters' device, in the dtype their updates are computed in."""
    for p in params.values():
        return torch.ones((), dtype=p.dtype, device=p.device)
    return torch.ones(())


def merge_hyperparameters(*declared: Mapping[str, float | Schedule]) -> dict[str, float | Schedule]:
    """The union of declared hyperparameters; one name is one number, so two different values are refused."""
    merged: dict[str, float | Schedule] = {}
    for hyperparameters in declared:
        for name, value in hyperparameters.items():
            if name in merged and merged[name] != value:
                raise ValueError(
                    f"hyperparameter {name!r} is declared twice with different values ({merged[name]} and {value}); "
                    f"give both the same value, or one of them a name of its own: Named('scalar_{name}', {value})."
                )
            merged[name] = value
    return merged
