"""The duration of each phase of compilation, and the use of torch's caches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_compile.explain._facts import CacheUse, Phase
from fusion_compile.explain._run.listen import TraceRecord

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
    return tuple(Phase(name, round(s, 6)) for name, s in seconds.items() if s > 0)


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
