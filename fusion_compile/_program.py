"""What was captured: the graph, its inputs by name, and which of them it writes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from fusion_compile._types import Tensors
from fusion_compile.passes import Finding, find_host_syncs


@dataclass(frozen=True)
class Program:
    """One captured graph (Dynamo's level) of a step. `nodes`: calls in it; `state`: how many tensors it updates in place."""

    graph: torch.fx.GraphModule
    nodes: int
    state: int
    findings: tuple[Finding, ...]

    def operators(self) -> Counter[str]:
        """Calls by operator name."""
        return Counter(
            str(getattr(n.target, "__name__", n.target))
            for n in self.graph.graph.nodes
            if n.op in ("call_function", "call_method")
        )

    def refuse_host_syncs(self) -> None:
        """Raise ValueError naming the user's line if the graph would wait for the device or cannot be captured."""
        if self.findings:
            first = self.findings[0]
            raise ValueError(f"{first.where}\n{first.op}: {first.why} {first.remedy}")


def record(graph: torch.fx.GraphModule, inputs: list[Any], state: Tensors) -> Program:
    """A `Program` from a captured graph."""
    nodes = sum(n.op in ("call_function", "call_method", "call_module") for n in graph.graph.nodes)
    return Program(graph, nodes, len(state), tuple(find_host_syncs(graph)))
