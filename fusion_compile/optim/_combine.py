"""`chain` and `partition`: how transforms are joined; `wrapped`: what a transform around another passes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import (
    Context,
    Facts,
    Periodic,
    State,
    Transform,
    bound,
    merge_hyperparameters,
)


def chain(*transforms: Transform, name: str = "chain") -> Transform:
    """Apply `transforms` from left to right; the state is the tuple of their states.

    At most one of them may move the gradient point. Its roles are those that any of them asks for.
    """
    if not transforms:
        raise ValueError("chain() needs at least one transform.")
    movers = [i for i, t in enumerate(transforms) if t.gradient_point is not None]
    if len(movers) > 1:
        names = ", ".join(transforms[i].name for i in movers)
        raise ValueError(f"{names} both move the point at which the gradient is taken; keep one of them.")

    def init(params: Tensors) -> State:
        return tuple(t.init(params) for t in transforms)

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        new_state = []
        for transform, part in zip(transforms, state, strict=True):
            updates, part = transform.update(updates, part, params, context)
            new_state.append(part)
        return updates, tuple(new_state)

    gradient_point = None
    if movers:
        at = movers[0]
        moves = transforms[at].gradient_point

        def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
            assert moves is not None
            return moves(params, state[at], context)

    def bind(facts: Facts) -> Transform:
        return chain(*(bound(t, facts) for t in transforms), name=name)

    def put(state: State, i: int, part: State) -> State:
        return (*state[:i], part, *state[i + 1 :])

    parts: dict[int, Transform] = dict(enumerate(transforms))
    return Transform(
        init,
        update,
        merge_hyperparameters(*(t.hyperparameters for t in transforms)),
        tuple(dict.fromkeys(role for t in transforms for role in t.roles)),
        gradient_point,
        name,
        _merged_diagnostics(parts),
        _merged_periodic(parts, lambda params, _: params, put),
        _one_period(transforms),
        None
        if all(t.bind is None for t in transforms)
        else lambda f: chain(*(bound(t, f) for t in transforms), name=name),
    )


def part_of(tensors: Mapping[str, Any], role: str) -> dict[str, Any]:
    """What of a dictionary by bank key belongs to `role`."""
    return {key: t for key, t in tensors.items() if key.split("/", 1)[0] == role}


def partition(transforms: Mapping[str, Transform], name: str = "partition") -> Transform:
    """One transform for each role: bank ``"spectral/384x1536"`` goes to ``transforms["spectral"]``.

    The state is a dictionary by role, of the roles that have parameters. A bank whose role has no transform is a
    ValueError.
    """

    def check(params: Tensors) -> None:
        for key in params:
            if key.split("/", 1)[0] not in transforms:
                raise ValueError(f"bank {key!r} has no transform; partition() was given {', '.join(transforms)}.")

    def init(params: Tensors) -> State:
        check(params)
        parts = {role: part_of(params, role) for role in transforms}
        return {role: transforms[role].init(part) for role, part in parts.items() if part}

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        new_updates: Tensors = {}
        new_state = {}
        for role in state:
            part, new_state[role] = transforms[role].update(
                part_of(updates, role), state[role], part_of(params, role), context
            )
            new_updates.update(part)
        return {key: new_updates[key] for key in updates}, new_state

    gradient_point = None
    if any(t.gradient_point is not None for t in transforms.values()):

        def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
            points: Tensors = {}
            for role in state:
                part, moves = part_of(params, role), transforms[role].gradient_point
                points.update(part if moves is None else moves(part, state[role], context))
            return {key: points[key] for key in params}

    def bind(facts: Facts) -> Transform:
        return partition({role: bound(t, part_of(facts, role)) for role, t in transforms.items()}, name)

    return Transform(
        init,
        update,
        merge_hyperparameters(*(t.hyperparameters for t in transforms.values())),
        tuple(transforms),
        gradient_point,
        name,
        _merged_diagnostics(transforms),
        _merged_periodic(transforms, part_of, lambda state, role, part: {**state, role: part}),
        _one_period(tuple(transforms.values())),
        None if all(t.bind is None for t in transforms.values()) else bind,
    )


def wrapped(
    base: Transform, field: str = "base", params_of: Callable[[Tensors, State], Tensors] = lambda params, _: params
) -> dict[str, Any]:
    """What a transform whose state keeps the state of `base` under `field` passes on: keywords of `Transform`.

    `params_of(params, state)`: what `base` sees as its parameters (Schedule-Free's z). The wrapper's `bind` is its own.
    """

    def inside(periodic: Periodic) -> Periodic:
        def lift(fn: Callable[[State, Tensors, Context], State]) -> Callable[[State, Tensors, Context], State]:
            return lambda state, params, context: state._replace(
                **{field: fn(getattr(state, field), params_of(params, state), context)}
            )

        first = None if periodic.first is None else lift(periodic.first)
        return periodic._replace(update=lift(periodic.update), first=first)

    passed: dict[str, Any] = {"periodic": tuple(map(inside, base.periodic)), "period": base.period}
    tells = base.diagnostics
    if tells is not None:
        passed["diagnostics"] = lambda state: tells(getattr(state, field))
    return passed


def _merged_diagnostics(parts: Mapping[Any, Transform]) -> Callable[[State], dict[str, Tensor]] | None:
    """What every part tells, by the place of its state; a name that two parts use is told by the later one."""
    telling = {at: t.diagnostics for at, t in parts.items() if t.diagnostics is not None}
    if not telling:
        return None

    def diagnostics(state: State) -> dict[str, Tensor]:
        told: dict[str, Tensor] = {}
        for at, tells in telling.items():
            if isinstance(state, tuple) or at in state:
                told |= tells(state[at])
        return told

    return diagnostics


def _merged_periodic(
    parts: Mapping[Any, Transform],
    params_of: Callable[[Tensors, Any], Tensors],
    put: Callable[[State, Any, State], State],
) -> tuple[Periodic, ...]:
    """The parts' periodic work on the whole state; `put(state, at, part)` is `state` with one part replaced."""

    def at_place(at: Any, periodic: Periodic) -> Periodic:
        def lift(fn: Callable[[State, Tensors, Context], State]) -> Callable[[State, Tensors, Context], State]:
            def on_whole(state: State, params: Tensors, context: Context) -> State:
                if isinstance(state, dict) and at not in state:  # a role without parameters
                    return state
                return put(state, at, fn(state[at], params_of(params, at), context))

            return on_whole

        first = None if periodic.first is None else lift(periodic.first)
        return periodic._replace(update=lift(periodic.update), first=first)

    return tuple(at_place(at, periodic) for at, t in parts.items() for periodic in t.periodic)


def _one_period(transforms: Sequence[Transform]) -> int:
    periods = sorted({t.period for t in transforms if t.period})
    if len(periods) > 1:
        several = " and every ".join(map(str, periods))
        raise ValueError(f"two parts single out every {several} steps; give them one period.")
    return periods[0] if periods else 0
