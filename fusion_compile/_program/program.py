"""A captured graph: as it was captured, and in ATen operators on demand."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import fx

from fusion_compile import _compat
from fusion_compile._program.memory.schedule import Schedule
from fusion_compile._say_once import SayOnce
from fusion_compile.passes import Finding, find_host_syncs, lower_to_aten
from fusion_compile.passes.find_host_syncs import matters_on_a_gpu_alone

REGIONS = ("forward", "backward", "optimizer", "state")
"""Parts of a step's graph. "state" is the rest: gradient point, views, non-finite skip and write-back. With several
ranks there is "communication", too."""

_CONTAINERS = {"", "_modules", "_parameters", "_buffers"}


@dataclass(frozen=True)
class CompiledRegion:
    """A part of a program that is compiled by itself, once.

    Attributes:
        name: Its name in the graph.
        called: How often a step calls it.
        repeats: Whether blocks of the graph repeat it.
        kernels: Operators that compute; views are none.
        parts: Of which of `REGIONS` they are, in order.
        is_shared: Whether another program of the step had compiled it.
    """

    name: str
    called: int
    repeats: bool
    kernels: int
    parts: tuple[str, ...]
    is_shared: bool = False


@dataclass(frozen=True)
class Program:
    """One captured graph. `gradients`: whether they were enabled where it begins. `captured_by`: ``"read"`` where
    Dynamo read the program, ``"run"`` where it ran and its ATen operators were written down. `compiled`: the regions
    that it was compiled in; none where it was compiled as one. `schedule`: what the compiler wrote for it."""

    graph: fx.GraphModule
    gradients: bool = True
    captured_by: str = "read"
    compiled: list[CompiledRegion] = field(default_factory=list, compare=False)
    schedule: Schedule = field(default_factory=Schedule, compare=False)

    @cached_property
    def aten(self) -> fx.GraphModule:
        """The graph in ATen operators, traced on fake tensors at the first access."""
        if self.captured_by == "run":
            return self.graph
        return lower_to_aten(self.graph, gradients=self.gradients)

    @cached_property
    def not_in_aten(self) -> str:
        """torch's reason why the graph cannot be written in ATen operators; "" if it can."""
        try:
            self.aten  # noqa: B018
        except Exception as error:  # of any kind: the program itself may still compile
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return ""

    @property
    def input_names(self) -> dict[str, str]:
        """Input of the graph -> its name where it comes from, ``state/params/…`` or ``batch/0``."""
        return {n.name: n.meta.get("label") or _readable(n) for n in self.graph.graph.find_nodes(op="placeholder")}

    @property
    def nodes(self) -> int:
        """Calls in the graph as it was captured."""
        return sum(n.op in ("call_function", "call_method", "call_module") for n in self.graph.graph.nodes)

    @property
    def checkpoints(self) -> int:
        """Calls of activation checkpointing. In a graph captured by running: regions that the backward recomputes."""
        nodes = self.graph.graph.nodes
        if self.captured_by == "run":
            return len({number for n in nodes if (number := recomputed_region(n))})
        return sum("activation_checkpoint" in str(n.target) for n in nodes if n.op == "call_function")

    @property
    def backwards(self) -> int:
        """Calls of ``torch.autograd.grad``. In a graph captured by running: backwards with a forward before each."""
        nodes = self.graph.graph.nodes
        if self.captured_by == "run":
            parts = [part for n in nodes if (part := region_of(n)) in ("forward", "backward")]
            return sum(pair == ("forward", "backward") for pair in itertools.pairwise(parts))
        return sum(n.target is torch.autograd.grad for n in nodes)

    def findings(self, *, thorough: bool) -> tuple[Finding, ...]:
        """Host syncs and operators that cannot be captured.

        `thorough` searches the ATen operators too, backward included. If the graph cannot be written in them, a warning
        says so, and the rest is still searched.
        """
        found = list(find_host_syncs(self.graph))
        if thorough and self.not_in_aten:
            SayOnce()(
                "not in ATen",
                f"the backward was not searched for host syncs, because the graph could not be written out in ATen's "
                f"operators ({self.not_in_aten}).",
            )
        elif thorough:
            found += find_host_syncs(self.aten)
        return tuple(dict.fromkeys(found))

    def operators(self) -> dict[str, Counter[str]]:
        """ATen calls by region and operator, views and metadata reads included."""
        counts: dict[str, Counter[str]] = {region: Counter() for region in REGIONS}
        for node in self.aten.graph.nodes:
            if node.op == "call_function":
                name = str(getattr(node.target, "__name__", node.target)).removesuffix(".default")
                counts.setdefault(region_of(node), Counter())[name] += 1
        return counts


def _readable(node: fx.Node) -> str:
    """``L['state']['params/scalar/float32']`` as ``state/params/scalar/float32``, ``L['batch'][0][1]`` as ``batch/1``,
    a module's own tensor by its full name."""
    said = _compat.input_source(node).rpartition("cell_contents")[2]
    parts = re.findall(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)|'(\w+)'\)", said)
    names = [name for part in parts if (name := next(filter(None, part), "")) not in _CONTAINERS]
    if names[:1] == ["self"]:
        return ".".join(names[1:]) or node.name
    return re.sub("^batch/0/", "batch/", "/".join(names)) or node.name


def region_of(node: fx.Node) -> str:
    """Which of `REGIONS` a call of a step's graph belongs to."""
    return str((node.meta.get("custom") or {}).get("region", "state"))


def recomputed_region(node: fx.Node) -> int:
    """Which checkpointed region `node` recomputes in the backward, counted from 1; 0 if it recomputes nothing."""
    return int((node.meta.get("custom") or {}).get("recomputed", 0))


def refuse_host_syncs(findings: tuple[Finding, ...], *, on_cpu: bool) -> None:
    """Raise ValueError naming the user's line if a graph would wait for the device or cannot be captured."""
    for first in findings:
        if on_cpu and matters_on_a_gpu_alone(first):
            continue
        raise ValueError(f"{first.where or 'the step'}\n{first.op}: {first.why} {first.remedy}")
