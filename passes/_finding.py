"""What a reader of graphs found: what, where in the user's source, why, and what to do."""

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
"""What a finding can be; docs/explain.md says what each means."""


@dataclass(frozen=True)
class Finding:
    """`kind`: one of `KINDS`. `op`: the operator or object. `where`: ``"file:line"`` of the user's source, or ``""``
    when the trace kept none. `why` and `remedy`: sentences. `severity`: "error" for what breaks a promise (one graph,
    one replay, no wait), "warning" for what costs, "note" for what is good to know."""

    kind: str
    op: str
    where: str
    why: str
    remedy: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.where or 'unknown line'}: {self.op} ({self.kind}): {self.why} {self.remedy}"
