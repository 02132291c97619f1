"""`chain` and `partition`: how transforms are joined."""

from __future__ import annotations

from collections.abc import Mapping

from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Context, State, Transform, merge_hyperparameters


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

    roles = tuple(dict.fromkeys(role for t in transforms for role in t.roles))
    return Transform(
        init, update, merge_hyperparameters(*(t.hyperparameters for t in transforms)), roles, gradient_point, name
    )


def partition(transforms: Mapping[str, Transform], name: str = "partition") -> Transform:
    """One transform for each role: bank ``"spectral/384x1536"`` goes to ``transforms["spectral"]``.

    The state is a dictionary by role, of the roles that have parameters. A bank whose role has no transform is a
    ValueError.
    """

    def part_of(tensors: Tensors, role: str) -> Tensors:
        return {key: t for key, t in tensors.items() if key.split("/", 1)[0] == role}

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

    return Transform(
        init,
        update,
        merge_hyperparameters(*(t.hyperparameters for t in transforms.values())),
        tuple(transforms),
        gradient_point,
        name,
    )
