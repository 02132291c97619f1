"""Transforms inside transforms: how the extras of a part become those of the whole.

`chain`, `partition` and every wrapper keep the state of a part inside their own. `Inner` says where; `lift` turns the
part's functions into functions of the outer state; `merge` joins the extras of several parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import (
    BankInfos,
    Context,
    Extras,
    Periodic,
    State,
    Transform,
    bound,
    merge_hyperparameters,
)

Work = Callable[[State, Tensors, Context], State]


class Inner(NamedTuple):
    """Where a part lies in the whole. `get(state)`: its state, None if it has none (a role without parameters);
    `put(state, part)`: `state` with the part's replaced; `params(params, state)`: what the part sees as parameters."""

    get: Callable[[State], State | None]
    put: Callable[[State, State], State]
    params: Callable[[Tensors, State], Tensors] = lambda params, state: params


BASE = Inner(lambda state: state.base, lambda state, part: state._replace(base=part))
"""The part of a wrapper whose state is a NamedTuple with a field ``base``."""
BASE_AT_Z = BASE._replace(params=lambda params, state: state.z)
"""The same, where the part steps Schedule-Free's z."""


def lift(extras: Extras, inner: Inner) -> Extras:
    """`extras` of a part as functions of the outer state. `bind` is dropped: only the whole can rebuild itself."""
    point, show = extras.gradient_point, extras.diagnostics

    def on_outer(fn: Work) -> Work:
        def work(state: State, params: Tensors, context: Context) -> State:
            part = inner.get(state)
            return state if part is None else inner.put(state, fn(part, inner.params(params, state), context))

        return work

    def gradient_point(params: Tensors, state: State, context: Context) -> Tensors:
        assert point is not None
        part, own = inner.get(state), inner.params(params, state)
        return own if part is None else point(own, part, context)

    def diagnostics(state: State) -> Mapping[str, Tensor]:
        assert show is not None
        part = inner.get(state)
        return {} if part is None else show(part)

    def on_outer_periodic(periodic: Periodic) -> Periodic:
        first = None if periodic.first is None else on_outer(periodic.first)
        return periodic._replace(update=on_outer(periodic.update), first=first)

    return extras._replace(
        gradient_point=None if point is None else gradient_point,
        diagnostics=None if show is None else diagnostics,
        periodic=tuple(map(on_outer_periodic, extras.periodic)),
        bind=None,
    )


def merge(name: str, parts: Sequence[Extras]) -> Extras:
    """The extras of a whole whose parts have these (lifted) extras. It descends if any part does, and may follow a
    step if all parts may.

    If two parts report a diagnostic of one name, the later part's value is shown. The caller sets `gradient_point`
    and `bind`, which depend on how the parts are joined.
    """
    periods = sorted({part.period for part in parts if part.period})
    if len(periods) > 1:
        several = " and every ".join(map(str, periods))
        raise ValueError(f"two parts single out every {several} steps; give them one period.")
    reports = [part.diagnostics for part in parts if part.diagnostics is not None]

    def diagnostics(state: State) -> Mapping[str, Tensor]:
        shown: dict[str, Tensor] = {}
        for report in reports:
            shown.update(report(state))
        return shown

    return Extras(
        name,
        merge_hyperparameters(*(part.hyperparameters for part in parts)),
        tuple(dict.fromkeys(role for part in parts for role in part.roles)),
        diagnostics=diagnostics if reports else None,
        periodic=tuple(periodic for part in parts for periodic in part.periodic),
        period=periods[0] if periods else 0,
        descends=any(part.descends for part in parts),
        after_step=all(part.after_step for part in parts),
        notes=tuple(note for part in parts for note in part.notes),
        second_moments=tuple(dict.fromkeys(field for part in parts for field in part.second_moments)),
        alignment=max((part.alignment for part in parts), default=1),
        stored={field: codec for part in parts for field, codec in part.stored.items()},
        max_aspect=min((part.max_aspect for part in parts), default=math.inf),
        pools=next((part.pools for part in parts if part.pools), ""),
    )


def wrap(
    base: Transform,
    name: str,
    hyperparameters: Mapping[str, float | Schedule],
    *,
    diagnostics: Callable[[Any], Mapping[str, Tensor]] | None = None,
    inner: Inner = BASE,
    rebuild: Callable[[Transform], Transform] | None = None,
) -> Extras:
    """The extras of a transform that wraps `base`: all that `base` has, and the wrapper's own.

    `rebuild(base)` is the same wrapper around another base; it is called when `base` wants to know its banks.
    """
    own = Extras(hyperparameters=hyperparameters, diagnostics=diagnostics)
    whole = merge(name, [lift(base.extras, inner), own])
    if base.gradient_point is not None:
        whole = whole._replace(gradient_point=lift(base.extras, inner).gradient_point)
    if rebuild is None or base.bind is None:
        return whole

    def bind(infos: BankInfos) -> Transform:
        assert rebuild is not None
        return rebuild(bound(base, infos))

    return whole._replace(bind=bind)
