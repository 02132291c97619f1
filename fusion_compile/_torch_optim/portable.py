"""What a copied or pickled torch optimizer takes along, and the optimizer's inside made of it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusion_compile._state.kept_average import KeptAverage
from fusion_compile._torch_optim.group_record import GroupRecord
from fusion_compile._torch_optim.grouped_update import GroupedUpdate
from fusion_compile._torch_optim.update_program import UpdatePrograms
from fusion_compile.optim._resolve import OptimizerChoice, resolve_optimizer
from fusion_compile.optim._transform import Transform
from fusion_compile.optim.averaged import averaged


class Averaging(NamedTuple):
    """What an optimizer is made of, and the averages of its weights."""

    source: OptimizerChoice
    averages: tuple[KeptAverage, ...]


def with_averages(transform: Transform, averages: Sequence[KeptAverage]) -> Transform:
    """`transform`, and what keeps `averages` of its weights."""
    return averaged(transform, [kept.average for kept in averages]) if averages else transform


def portable(inside: GroupedUpdate) -> dict[str, Any]:
    """Everything about `inside` but its banks and programs."""
    return {
        "inside": (
            inside.source,
            dict(inside.numbers),
            (inside.programs.mode, inside.programs.backend),
            (inside.force_scalar, inside.force_spectral),
            inside.evaluating,
            inside.half_precision,
            inside.averages,
        ),
        "released": inside.released is not None,
        "records": [(record.names, record.schedules, record.seen) for record in inside.records],
    }


def restored(state: Mapping[str, Any]) -> GroupedUpdate:
    """The inside of what `portable` gave, with ``routes`` and, of a copy, its ``transform``."""
    source, numbers, programs, (off, on), evaluating, *rest = state["inside"]
    half_precision = rest[0] if rest else "master"  # it was pickled before there was a choice
    averages = rest[1] if len(rest) > 1 else ()
    return GroupedUpdate(
        source,
        state["transform"] if "transform" in state else with_averages(resolve_optimizer(source), averages),
        numbers,
        UpdatePrograms(*programs),
        off,
        on,
        half_precision=half_precision,
        known_routes={r.name: r for r in state["routes"]},
        records=[GroupRecord(*record) for record in state["records"]],
        evaluating=evaluating,
        averages=averages,
    )
