"""What a reader of graphs found: what, where in the user's source, why, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """`kind`: one word for what it is (``"host_sync"``, ``"capture_unsafe"``, ``"graph_break"``, …). `op`: the operator
    or object. `where`: ``"file:line"`` of the user's source, or ``""`` when the trace kept none. `why` and `remedy`:
    sentences. `severity`: "error" for what breaks a promise (one graph, one replay, no wait), "warning" for what costs,
    "note" for what is good to know."""

    kind: str
    op: str
    where: str
    why: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where or 'unknown line'}: {self.op} ({self.kind}): {self.why} {self.remedy}"
