"""What a pass is: a graph in, a graph and an account of what was done out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx


@dataclass(frozen=True)
class Declined:
    """A place where a pass could have acted and did not. `node`: its name in the graph; `reason`: a sentence."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    `exact`: results are bitwise unchanged. `changed`: how many places were rewritten. `nodes_before` and `nodes_after`
    count calls, not inputs and outputs. `bytes_added`: memory that the rewritten program holds and the original did
    not.
    """

    name: str
    exact: bool
    changed: int
    nodes_before: int
    nodes_after: int
    bytes_added: int = 0
    declined: tuple[Declined, ...] = ()


class Pass(Protocol):
    """Rewrites `graph_module` in place and reports; a second run changes nothing."""

    def __call__(self, graph_module: fx.GraphModule) -> PassReport: ...


def run_passes(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> tuple[PassReport, ...]:
    """Run `passes` in order on `graph_module`, in place; lint and recompile it once at the end."""
    reports = tuple(apply(graph_module) for apply in passes)
    graph_module.graph.lint()
    graph_module.recompile()
    return reports
