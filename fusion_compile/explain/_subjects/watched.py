"""The explanation of a training step or a sampler that is watched while it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from fusion_compile.explain._arguments import Call
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._run.captured import modes_put_back
from fusion_compile.explain._run.runtime import observe
from fusion_compile.explain._show.summary import summarize
from fusion_compile.explain._subjects.registry import Subject


def explain_watched(obj: Any, subject: Subject[Any], calls: tuple[Call, ...], device: str | None) -> Explanation:
    """Call `obj` on each of `calls`, listen to torch meanwhile, put its state back, and explain it.

    Without `calls` only explain it.
    """
    if not calls:
        return subject.explain(obj, device)
    saved = subject.state(obj) if subject.state is not None else None
    model = getattr(obj, "model", None)
    try:
        with modes_put_back([model] if isinstance(model, nn.Module) else []):
            facts, seen, notes = observe(obj, calls, backend=None, fresh=not subject.is_compiled(obj))
    finally:
        if subject.restore is not None:
            subject.restore(obj, saved)
    explanation = subject.explain(obj, device)
    findings = deduplicate((*explanation.findings, *seen))
    return dataclasses.replace(
        explanation,
        runtime=facts,
        findings=findings,
        summary=summarize(findings, explanation.graphs, facts, captured=bool(explanation.graphs)),
        notes=(*explanation.notes, *notes),
    )
