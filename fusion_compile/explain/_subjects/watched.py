"""A training step or a sampler, which explain themselves, watched while they run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fusion_compile._sampler.module import SamplerModule
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._graph.static_findings import one_for_each
from fusion_compile.explain._run.runtime import observe
from fusion_compile.explain._show.summary import summarize
from fusion_compile.explain._subjects.sampler import explain_sampler


def explain_compiled(
    obj: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    device: str | None,
    run: bool,
    calls: Sequence[tuple[Any, ...]],
) -> Explanation:
    """What ``obj.explain()`` says; with `args`, `obj` is called on them and on each of `calls` first, and listened to.
    A training step's state is then put back: parameters, optimizer, counts, random numbers."""
    if not run or not (args or kwargs):
        return _told(obj, device)
    saved = obj.state_dict() if hasattr(obj, "warm_start") else None
    try:
        facts, seen, notes = observe(obj, args, kwargs, calls=calls, fresh=not getattr(obj, "programs", None))
    finally:
        if saved is not None:
            obj.load_state_dict(saved)
    told = _told(obj, device)
    findings = one_for_each((*told.findings, *seen))
    return dataclasses.replace(
        told,
        runtime=facts,
        findings=findings,
        summary=summarize(findings, told.graphs, facts, captured=bool(told.graphs)),
        notes=(*told.notes, *notes),
    )


def _told(obj: Any, device: str | None) -> Explanation:
    if isinstance(obj, SamplerModule):
        return explain_sampler(obj, device)
    told: Explanation = obj.explain(device=device)
    return told
