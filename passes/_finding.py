"""A finding: kind, line of the user's source, reason and remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]

KINDS = (
    "graph_break",
    "side_effect",
    "host_sync",
    "capture_unsafe",
    "recompile",
    "python_scalar",
    "growing_state",
    "dynamic_shape",
    "rebound_parameter",
    "unmarked_mutation",
    "cpu_tensor",
    "autograd_escape",
    "rng_in_checkpoint",
    "checkpoint_ignored",
    "cudagraph_skip",
    "cudagraph_partition",
    "rerecord",
)
"""The kinds of findings; docs/explain.md explains each."""


@dataclass(frozen=True)
class Finding:
    """One thing that a reader of graphs found.

    Attributes:
        kind: One of `KINDS`.
        op: The operator or object.
        where: ``"file:line"`` of the user's source, or ``""`` when the trace kept none.
        why: The reason, as a sentence.
        remedy: What to do, as a sentence.
        severity: "error" for what breaks a promise (one graph, one replay, no wait), "warning" for what costs time or
            memory, "note" for what is good to know.
    """

    kind: str
    op: str
    where: str
    why: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where or 'unknown line'}: {self.op} ({self.kind}): {self.why} {self.remedy}"
