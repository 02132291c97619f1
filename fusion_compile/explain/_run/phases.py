"""The duration of each phase of compilation, and the use of torch's caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_compile.explain._facts import CacheUse, Phase
from fusion_compile.explain._run.listen import PHASES, TraceRecord

# From the outermost phase to the innermost; each lies within the one before it.
_NESTED = (
    ("Dynamo: from Python to a graph", "entire_frame_compile_time_s"),
    ("AOTAutograd: gradients and ATen operators", "backend_compile_time_s"),
    ("Inductor: passes, lowering, fusion", "inductor_compile_time_s"),
    ("Code: writing and compiling kernels", "code_gen_time_s"),
)


def read_phases(records: Sequence[TraceRecord]) -> tuple[Phase, ...]:
    """Sum up the seconds of each phase over all compilations, without the phases inside it."""
    seconds = {name: 0.0 for name, _ in _NESTED}
    for record in records:
        if record.kind == "compilation_metrics":
            spans = [_seconds(record.data, field) for _, field in _NESTED]
            for (name, _), own, inner in zip(_NESTED, spans, [*spans[1:], 0.0], strict=True):
                seconds[name] += max(0.0, own - inner)
    for name, span in _without_dynamo(records).items():
        seconds[name] += span
    return tuple(Phase(name, round(s, 6)) for name, s in seconds.items() if s > 0)


def _without_dynamo(records: Sequence[TraceRecord]) -> dict[str, float]:
    """Sum up the phases of compilations that Dynamo has no part in, from torch's timeline: a step that was captured by
    running it is given to the backend as it is."""
    begun: dict[str, float] = {}
    spans = dict.fromkeys(PHASES, 0.0)
    for record in records:
        if record.kind == "chromium_event" and not record.compile_id:
            name, time = record.data["name"], float(record.data["ts"]) / 1e6
            if record.data["ph"] == "B":
                begun[name] = time
            elif name in begun:
                spans[name] += time - begun.pop(name)
    inner = [*list(spans.values())[1:], 0.0]
    named = [name for name, _ in _NESTED[1:]]
    return {name: max(0.0, own - inside) for name, own, inside in zip(named, spans.values(), inner, strict=True)}


def _seconds(metrics: Any, field: str) -> float:
    value = metrics.get(field)
    return float(value) if isinstance(value, int | float) else 0.0


def read_cache_use(records: Sequence[TraceRecord]) -> CacheUse:
    """Count the uses of Inductor's and AOTAutograd's caches of compiled graphs."""

    def count(what: str) -> int:
        return sum(
            r.kind.startswith(("fx_graph_", "aotautograd_cache_")) and r.kind.endswith(f"_{what}") for r in records
        )

    return CacheUse(count("hit"), count("miss"), count("bypass"))
