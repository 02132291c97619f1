"""Parameter groups inside one transform: every group keeps a state of its own and reads numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import BankInfos, Context, Extras, State, Transform, bound

DEFAULT = "default"
"""The group of every parameter that no named group lists."""
_MARK = "@"

Work = Callable[[State, Tensors, Context], State]


def in_group(bank: str, group: str) -> str:
    """The key of a bank of `group`: ``"scalar/float32"`` -> ``"scalar/float32@no_decay"``."""
    return bank if group == DEFAULT else f"{bank}{_MARK}{group}"


def group_of(bank: str) -> str:
    """The group that the key of a bank names; `DEFAULT` where it names none."""
    return bank.partition(_MARK)[2] or DEFAULT


def number_of(group: str, name: str) -> str:
    """The hyperparameter that holds a group's own number: ``"no_decay.weight_decay"``."""
    return f"{group}.{name}"


def banks_of(tensors: Mapping[str, Any], group: str) -> dict[str, Any]:
    """The entries of a dictionary by bank key that belong to `group`."""
    return {key: t for key, t in tensors.items() if group_of(key) == group}


def grouped(transform: Transform, groups: Mapping[str, Mapping[str, float | Schedule]]) -> Transform:
    """Apply `transform` to each group of banks by itself, with the numbers of the group.

    `groups`: the numbers that differ, by group. Each becomes a hyperparameter ``"<group>.<name>"``. A number that a
    group does not list is the default group's live value. The state is a dictionary by group, of the groups that have
    parameters; so whatever `transform` pools over all parameters (a norm, a step size) it pools over one group.
    Diagnostics of a named group are called ``"<group>/<name>"``.
    """

    def context_of(group: str, context: Context) -> Context:
        numbers = context.hyperparameters
        own = {name: numbers[number_of(group, name)] for name in groups.get(group, ())}
        return context._replace(hyperparameters={**numbers, **own}) if own else context

    def init(params: Tensors) -> State:
        owned = {group: banks_of(params, group) for group in (DEFAULT, *groups)}
        return {group: transform.init(banks) for group, banks in owned.items() if banks}

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        moved: Tensors = {}
        after = {}
        for group, own in state.items():
            part, after[group] = transform.update(
                banks_of(updates, group), own, banks_of(params, group), context_of(group, context)
            )
            moved.update(part)
        return {key: moved[key] for key in updates}, after

    gradient_point = None
    if (move := transform.gradient_point) is not None:

        def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
            points: Tensors = {}
            for group, own in state.items():
                points.update(move(banks_of(params, group), own, context_of(group, context)))
            return {key: points[key] for key in params}

    diagnostics = None
    if (read := transform.diagnostics) is not None:

        def diagnostics(state: State) -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for group, own in state.items():
                prefix = "" if group == DEFAULT else f"{group}/"
                found |= {f"{prefix}{name}": value for name, value in read(own).items()}
            return found

    def on_every_group(work: Work) -> Work:
        return lambda state, params, context: {
            group: work(own, banks_of(params, group), context_of(group, context)) for group, own in state.items()
        }

    periodic = tuple(
        work._replace(
            update=on_every_group(work.update), first=None if work.first is None else on_every_group(work.first)
        )
        for work in transform.periodic
    )

    # Bound once, because a bound transform finds a bank by its key: one that lists layers sees those of all groups.
    def bind(infos: BankInfos) -> Transform:
        return grouped(bound(transform, infos), groups)

    own_numbers = {number_of(g, name): value for g, numbers in groups.items() for name, value in numbers.items()}
    extras = Extras(
        name=transform.name,
        hyperparameters={**transform.hyperparameters, **own_numbers},
        roles=transform.roles,
        gradient_point=gradient_point,
        diagnostics=diagnostics,
        periodic=periodic,
        period=transform.period,
        bind=None if transform.bind is None else bind,
        descends=transform.descends,
        after_step=transform.after_step,
        notes=transform.notes,
        second_moments=transform.extras.second_moments,
        alignment=transform.extras.alignment,
        stored=transform.extras.stored,
        max_aspect=transform.extras.max_aspect,
        pools=transform.extras.pools,
        leaves_unread=transform.extras.leaves_unread,
    )
    return Transform(init, update, extras)
