"""`chain`, `named_chain` and `partition`: how transforms are joined."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import Inner, lift, merge
from fusion_compile.optim._transform import BankInfos, Context, State, Transform, bound, check_transform


def chain(*transforms: Transform, name: str | None = None) -> Transform:
    """Apply `transforms` from left to right: each gets the updates of the one before it.

    The state is the tuple of their states. The chain wants the roles that any part wants, and takes a step if one part
    does. Source: optax's ``chain``. Deviations: at most one part takes a step, at most one moves the gradient point.
    Whatever follows a step must declare that it takes updates (``Extras.after_step``), as `clip_by_global_norm`,
    `scale_by_layer` and `scale_by_shape` do.

    Args:
        *transforms: The parts, from the gradient to the step.
        name: Shown in messages; by default made of the parts' names.

    Returns:
        The chain as one transform. Hyperparameters of one name are one number for all parts.

    Raises:
        ValueError: No part is given; two parts take a step or move the gradient point; a part follows the step that
            cannot; one hyperparameter has two values; two parts have different periods.
        TypeError: A part is not a transform.

    Example:
        >>> from fusion_compile import optim
        >>> sgd = optim.chain(optim.scale_by_momentum(0.9), optim.scale_by_learning_rate(0.1))
        >>> dict(sgd.hyperparameters)
        {'momentum': 0.9, 'lr': 0.1}
    """
    if not transforms:
        raise ValueError("chain() needs at least one transform.")
    for i, transform in enumerate(transforms):
        check_transform(f"chain(), part {i},", transform)
    name = f"chain({', '.join(t.name for t in transforms)})" if name is None else name
    return _in_sequence(dict(enumerate(transforms)), name, lambda parts: tuple(parts.values()))


def named_chain(*parts: tuple[str, Transform], name: str | None = None) -> Transform:
    """`chain` whose parts have names: the state is a dictionary by these names.

    Paths in checkpoints and reports then read ``optimizer/clip/…`` instead of ``optimizer/0/…``, and stay as they are
    when a part is added. Source: optax's ``named_chain``.

    Args:
        *parts: ``(name, transform)``, from the gradient to the step.
        name: Shown in messages; by default made of the parts' names.

    Returns:
        The chain as one transform.

    Raises:
        ValueError: A name is given twice, is empty, or contains ``/`` or ``.``, which separate names in paths; and what
            `chain` raises.
        TypeError: A part is not a pair of a name and a transform.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.named_chain(("adam", optim.scale_by_adam()), ("step", optim.scale_by_learning_rate(1e-3)))
        >>> list(optimizer.init({}))
        ['adam', 'step']
    """
    if not parts:
        raise ValueError("named_chain() needs at least one (name, transform).")
    named: dict[str, Transform] = {}
    for part in parts:
        if not (isinstance(part, tuple) and len(part) == 2 and isinstance(part[1], Transform)):
            raise TypeError(f"named_chain() was given {_shown(part)}; give pairs: ('adam', optim.scale_by_adam()).")
        key = part[0]
        if not isinstance(key, str) or not key or "/" in key or "." in key:
            raise ValueError(f"named_chain() cannot name a part {key!r}; give a string without '/' and '.'.")
        if key in named:
            raise ValueError(f"named_chain() has two parts named {key!r}; give each a name of its own.")
        named[key] = part[1]
    return _in_sequence(named, f"named_chain({', '.join(named)})" if name is None else name, dict)


def _shown(part: object) -> str:
    return f"the transform {part.name} without a name" if isinstance(part, Transform) else repr(part)


def _in_sequence(parts: Mapping[Any, Transform], name: str, pack: Callable[[dict[Any, State]], State]) -> Transform:
    """The parts one after another; ``state[key]`` is a part's state, and `pack` makes a state from parts by key."""
    movers = [t.name for t in parts.values() if t.gradient_point is not None]
    if len(movers) > 1:
        raise ValueError(f"{', '.join(movers)} both move the point at which the gradient is taken; keep one of them.")
    if len(steps := [t.name for t in parts.values() if t.descends]) > 1:
        raise ValueError(
            f"{' and '.join(steps)} both take a step in one chain: the second multiplies by -lr what the first has "
            f"already multiplied by -lr, and the loss goes up. Keep one of them."
        )
    _refuse_after_step(list(parts.values()))

    def init(params: Tensors) -> State:
        return pack({key: t.init(params) for key, t in parts.items()})

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        new_state = {}
        for key, transform in parts.items():
            updates, new_state[key] = transform.update(updates, state[key], params, context)
        return updates, pack(new_state)

    def inner(key: Hashable) -> Inner:
        def put(state: State, part: State) -> State:
            return pack({other: part if other == key else state[other] for other in parts})

        return Inner(lambda state: state[key], put)

    def bind(infos: BankInfos) -> Transform:
        return _in_sequence({key: bound(t, infos) for key, t in parts.items()}, name, pack)

    lifted = [lift(t.extras, inner(key)) for key, t in parts.items()]
    extras = merge(name, lifted)._replace(
        gradient_point=next((part.gradient_point for part in lifted if part.gradient_point is not None), None),
        bind=bind if any(t.bind is not None for t in parts.values()) else None,
    )
    return Transform(init, update, extras)


def _refuse_after_step(parts: Sequence[Transform]) -> None:
    """ValueError if a part follows the step and cannot take updates, which are negative and hold the learning rate."""
    last = next((i for i, t in enumerate(parts) if t.descends or t.gradient_point is not None), len(parts))
    for part in parts[last + 1 :]:
        step = parts[last]
        if step.gradient_point is not None:
            raise ValueError(
                f"{part.name} follows {step.name} in one chain, but what {step.name} returns is how its average moves, "
                f"and no part may change that. Put {part.name} into the part that it wraps."
            )
        if not part.after_step:
            raise ValueError(
                f"{part.name} follows {step.name}, which takes the step, in one chain: it would be given updates, "
                f"which already hold -lr, instead of gradients or directions (a decay then makes weights grow, and a "
                f"normalization undoes lr). Put {part.name} before {step.name}. A part of your own that takes updates "
                f"declares Extras(after_step=True)."
            )


def part_of(tensors: Mapping[str, Any], role: str) -> dict[str, Any]:
    """The entries of one role in a dictionary by bank key."""
    return {key: t for key, t in tensors.items() if key.split("/", 1)[0] == role}


def partition(transforms: Mapping[str, Transform], name: str = "partition") -> Transform:
    """Give each role a transform of its own: bank ``"spectral/384x1536"`` goes to ``transforms["spectral"]``.

    The state is a dictionary by role, of the roles that have parameters.

    Args:
        transforms: By role, ``"spectral"`` (matrices) and ``"scalar"`` (everything else).
        name: Shown in messages.

    Returns:
        One transform for all parameters. A bank whose role has no transform is a ValueError in `init`.

    Raises:
        ValueError: No transform is given; some parts take a step and others do not; one hyperparameter has two values;
            two parts have different periods.
        TypeError: A part is not a transform.

    Example:
        >>> from fusion_compile import optim
        >>> matrices = optim.chain(optim.orthogonalize(), optim.scale_by_learning_rate(0.02))
        >>> optimizer = optim.partition({"spectral": matrices, "scalar": optim.adamw(optim.Named("scalar_lr", 3e-4))})
        >>> optimizer.roles
        ('spectral', 'scalar')
    """
    if not isinstance(transforms, Mapping):
        raise TypeError(
            f"partition() was given a {type(transforms).__name__}; give a dictionary by role: "
            f"{{'spectral': …, 'scalar': …}}."
        )
    if not transforms:
        raise ValueError("partition() needs at least one transform.")
    for role, transform in transforms.items():
        check_transform(f"partition(), role {role!r},", transform)
    still, moving = ([role for role, t in transforms.items() if t.descends == moves] for moves in (False, True))
    if still and moving:
        name_of_part = transforms[still[0]].name
        raise ValueError(
            f"partition(): {name_of_part}, the transform of {still[0]!r}, takes no step, but that of {moving[0]!r} "
            f"does; {still[0]!r} would go uphill. End each part with a learning rate: "
            f"chain({name_of_part}, scale_by_learning_rate(1e-3)). A part of your own that takes a step, or keeps its "
            f"parameters where they are, declares Extras(descends=True)."
        )

    def init(params: Tensors) -> State:
        for key in params:
            if key.split("/", 1)[0] not in transforms:
                raise ValueError(f"bank {key!r} has no transform; partition() was given {', '.join(transforms)}.")
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

    def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
        points: Tensors = {}
        for role in state:
            part, moves = part_of(params, role), transforms[role].gradient_point
            points.update(part if moves is None else moves(part, state[role], context))
        return {key: points[key] for key in params}

    def inner(role: str) -> Inner:
        return Inner(
            lambda state: state.get(role),
            lambda state, part: {**state, role: part},
            lambda params, state: part_of(params, role),
        )

    def bind(infos: BankInfos) -> Transform:
        return partition({role: bound(t, part_of(infos, role)) for role, t in transforms.items()}, name)

    extras = merge(name, [lift(t.extras, inner(role)) for role, t in transforms.items()])._replace(
        roles=tuple(transforms),
        gradient_point=gradient_point if any(t.gradient_point is not None for t in transforms.values()) else None,
        bind=bind if any(t.bind is not None for t in transforms.values()) else None,
    )
    return Transform(init, update, extras)
