"""The identity of a finding, and the removal of duplicates by it."""

from __future__ import annotations

from collections.abc import Iterable

from fusion_compile.passes import Finding

WAITS = frozenset({"host_sync", "capture_unsafe", "graph_break"})
"""Kinds of findings that show the same wait. One ``.item()`` is in the captured graph and in ATen's graph, under two
names, and it also breaks the graph."""


def identity(finding: Finding) -> str:
    """Return the text that two findings about the same thing share.

    - A wait with a source line is identified by that line, whatever its kind and operator.
    - A Python number is identified by its name: it is found as an argument and again where it is used.
    - Any other finding is identified by kind, operator and source line, and without a line by its reason.
    """
    if finding.kind in WAITS and finding.where:
        return f"wait at {finding.where}"
    if finding.kind == "python_scalar":
        return f"python_scalar {finding.op}"
    return f"{finding.kind} of {finding.op} at {finding.where or finding.why}"


def deduplicate(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Remove duplicate findings; keep the first of each identity, in order."""
    first: dict[str, Finding] = {}
    for finding in findings:
        first.setdefault(identity(finding), finding)
    return tuple(first.values())
