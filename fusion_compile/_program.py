"""What was captured: the graph as Dynamo saw it, and the same in ATen operators when somebody asks."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from fusion_compile.passes import Finding, find_host_syncs, lower_to_aten

REGIONS = ("forward", "backward", "optimizer", "state")
"""Parts of a step's graph; "state" is the rest: gradient point, views, non-finite skip and write-back."""


@dataclass(frozen=True)
class Program:
    """One captured graph of a step."""

    graph: fx.GraphModule

    @cached_property
    def aten(self) -> fx.GraphModule:
        """The graph in ATen operators; traced on fake tensors when first asked for."""
        return lower_to_aten(self.graph)

    @property
    def nodes(self) -> int:
        """Calls in the graph as Dynamo captured it."""
        return sum(n.op in ("call_function", "call_method", "call_module") for n in self.graph.graph.nodes)

    @property
    def checkpoints(self) -> int:
        """Calls of activation checkpointing."""
        return sum("activation_checkpoint" in str(n.target) for n in self.graph.graph.nodes if n.op == "call_function")

    @property
    def backwards(self) -> int:
        """Calls of ``torch.autograd.grad``."""
        return sum(n.target is torch.autograd.grad for n in self.graph.graph.nodes)

    def findings(self, *, thorough: bool) -> tuple[Finding, ...]:
        """Host syncs and operators that cannot be captured. `thorough` looks at ATen's operators too, backward
        included; if the graph cannot be written out in them, that is a warning and the rest is still searched."""
        found = list(find_host_syncs(self.graph))
        if thorough:
            try:
                found += find_host_syncs(self.aten)
            except Exception as error:  # of torch's tracing; the step itself may still compile
                warnings.warn(
                    f"the backward was not searched for host syncs, because the graph could not be written out in "
                    f"ATen's operators ({type(error).__name__}: {str(error).partition(chr(10))[0]}).",
                    stacklevel=2,
                )
        return tuple(dict.fromkeys(found))

    def operators(self) -> dict[str, Counter[str]]:
        """ATen calls by region and operator, views and metadata reads included."""
        counts: dict[str, Counter[str]] = {region: Counter() for region in REGIONS}
        for node in self.aten.graph.nodes:
            if node.op == "call_function":
                region = (node.meta.get("custom") or {}).get("region", "state")
                counts[region][str(getattr(node.target, "__name__", node.target)).removesuffix(".default")] += 1
        return counts


def refuse_host_syncs(findings: tuple[Finding, ...]) -> None:
    """Raise ValueError naming the user's line if a graph would wait for the device or cannot be captured."""
    if findings:
        first = findings[0]
        raise ValueError(f"{first.where or 'the step'}\n{first.op}: {first.why} {first.remedy}")
