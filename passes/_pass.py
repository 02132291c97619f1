"""The interface of a pass: a graph in, a graph and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import fx


@dataclass(frozen=True)
class Declined:
    """A place where a pass could have acted and did not. `node`: its name in the graph. `reason`: a sentence."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassReport:
    """What one pass did.

    Attributes:
        name: Of the pass.
        exact: Whether results are bitwise unchanged.
        changed: How many places were rewritten.
        nodes_before: Calls in the graph before, without inputs and outputs.
        nodes_after: The same, after.
        bytes_added: Memory that the rewritten program holds and the original did not.
        declined: Places that were left as they were, with reasons.
    """

    name: str
    exact: bool
    changed: int
    nodes_before: int
    nodes_after: int
    bytes_added: int = 0
    declined: tuple[Declined, ...] = ()


class Pass(Protocol):
    """Rewrites `graph_module` in place and returns a report; a second run changes nothing."""

    def __call__(self, graph_module: fx.GraphModule) -> PassReport: ...


def run_passes(graph_module: fx.GraphModule, passes: Sequence[Pass]) -> tuple[PassReport, ...]:
    """Run `passes` in order on `graph_module`, in place; lint and recompile it once at the end.

    Args:
        graph_module: The graph, which each pass rewrites.
        passes: Callables that take the graph and return a report.

    Returns:
        One report for each pass.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import drop_metadata_reads, run_passes, split_concatenations
        >>> graph_module = make_fx(lambda x: torch.zeros_like(x) + x, tracing_mode="fake")(torch.ones(2))
        >>> [report.changed for report in run_passes(graph_module, [drop_metadata_reads, split_concatenations])]
        [1, 0]
    """
    reports = tuple(apply(graph_module) for apply in passes)
    graph_module.graph.lint()
    graph_module.recompile()
    return reports
