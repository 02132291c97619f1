"""The explanation of a callable with example inputs: the graphs that Dynamo captures, and the events of a run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion_compile._program.program import Program
from fusion_compile.explain import _compat
from fusion_compile.explain._arguments import Call, Invocation
from fusion_compile.explain._environment import environment
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._facts import GraphFacts, RuntimeFacts
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._graph.graph_facts import graph_facts
from fusion_compile.explain._graph.roofline import Roofline, roofline
from fusion_compile.explain._graph.static_findings import (
    argument_names,
    defined_at,
    find_in_program,
    find_python_scalars,
)
from fusion_compile.explain._run.captured import capture, modules_within, put_back
from fusion_compile.explain._run.plain_attributes import PlainAttributes
from fusion_compile.explain._run.runtime import observe
from fusion_compile.explain._show.summary import summarize
from fusion_compile.passes import Finding
from fusion_compile.passes._compat import tree_leaves
from fusion_compile.passes._graph import op_name, value_of
from fusion_compile.passes._user_frame import user_line


def explain_callable(
    fn: Callable[..., Any], first: Invocation, run: Sequence[Call], *, device: str | None, backend: str
) -> Explanation:
    """Capture the graphs of the call `first`, then compile `fn` and make the calls `run`; see `explain`."""
    args, kwargs = first
    original = _compat.uncompiled(fn)
    placed = _device(original, args, kwargs)
    line = roofline(device, placed)
    addresses = _addresses(original, args, kwargs)
    attributes = PlainAttributes(modules_within(original, args, kwargs))
    programs = capture(fn, args, kwargs, attributes)
    names = argument_names(original)
    found = [_named(f, names) for program in programs for f in find_in_program(program)]
    found += attributes.findings()
    found += _rebound(original, addresses, args, kwargs, programs)
    runtime: RuntimeFacts | None = None
    notes: list[str] = []
    if run:
        with put_back(original, args, kwargs):
            runtime, seen, notes_seen = observe(fn, run, backend=backend)
        found += seen
        notes += notes_seen
    findings = deduplicate((*found, *find_python_scalars(original, args, kwargs)))
    graphs = [_facts(f"graph {i}", p, line, findings, names) for i, p in enumerate(programs) if not p.not_in_aten]
    notes += [
        f"graph {i} has no costs here because it cannot be written in ATen's operators ({p.not_in_aten})."
        for i, p in enumerate(programs)
        if p.not_in_aten
    ]
    if any(_keeps_for_the_backward(program) for program in programs):
        notes.append(
            "the memory is that of the forward alone: a result asks for a gradient, and a compiled forward also keeps "
            "what its backward needs. Explain a function that takes the gradient, or call it under torch.no_grad()."
        )
    if not programs:
        stopped = runtime is not None and bool(runtime.graph_breaks)
        why = (
            "it stopped before the first operator; the findings say where and why" if stopped else "it met no operator"
        )
        notes.append(f"Dynamo captured no graph: {why}.")
    is_module = isinstance(original, nn.Module)
    title = type(original).__name__ if is_module else getattr(original, "__qualname__", repr(original))
    return Explanation(
        f"{title}, {len(programs)} {'graph' if len(programs) == 1 else 'graphs'}",
        "callable",
        environment(placed.type, str(line)),
        summary=summarize(findings, graphs, runtime, captured=bool(programs), together=True),
        findings=findings,
        graphs=tuple(graphs),
        runtime=runtime,
        notes=tuple(notes),
    )


def _keeps_for_the_backward(program: Program) -> bool:
    """Whether a backward outside of `program` may follow its results."""
    results = [value_of(n) for n in program.graph.graph.output_node().all_input_nodes]
    return program.gradients and any(isinstance(t, Tensor) and t.requires_grad for t in results)


def _facts(
    name: str, program: Program, line: Roofline, findings: Sequence[Finding], arguments: Sequence[str]
) -> GraphFacts:
    region = _Regions(program.aten.graph)
    names = {node: _argument(said, arguments) for node, said in program.input_names.items()}
    return graph_facts(name, program.aten, line, region=region, input_names=names, findings=findings)


def _named(finding: Finding, arguments: Sequence[str]) -> Finding:
    """Name the input that `finding` is about as `_argument` does."""
    name, rest = re.match(r"(\S*)(.*)", finding.op, re.DOTALL).groups()  # type: ignore[union-attr]
    if not name.startswith(("given/", "explained/", "named/")):
        return finding
    return dataclasses.replace(finding, op=_argument(name, arguments) + rest)


def _argument(said: str, arguments: Sequence[str]) -> str:
    """Name ``given/1`` as the argument is named, and a tensor of the explained module by its full name."""
    parts = said.removeprefix("explained/").removeprefix("__self__/").split("/")
    if parts[0] == "given" and len(parts) > 1 and parts[1].isdigit() and int(parts[1]) < len(arguments):
        return "/".join([arguments[int(parts[1])], *parts[2:]])
    if parts[0] == "named":
        return "/".join(parts[1:])
    return said if parts == said.split("/") else ".".join(parts)


class _Regions:
    """The region of each node: its own tag if it has one, else forward, backward, or optimizer after the backward."""

    def __init__(self, graph: fx.Graph) -> None:
        self._after: set[fx.Node] = set()
        begun = False
        for node in graph.nodes:
            if node.meta.get("autograd_backward"):
                begun = True
            elif begun:
                self._after.add(node)

    def __call__(self, node: fx.Node) -> str:
        tagged = (node.meta.get("custom") or {}).get("region")
        if tagged:
            return str(tagged)
        if node.meta.get("autograd_backward"):
            return "backward"
        return "optimizer" if node in self._after else "forward"


def _device(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
    """Return the first GPU that holds a tensor of the arguments or modules, or the CPU."""
    tensors = [t for t in tree_leaves((args, dict(kwargs))) if isinstance(t, Tensor)]
    tensors += [p for module in modules_within(fn, args, kwargs) for p in module.parameters()]
    return next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))


def _addresses(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, tuple[Tensor, int]]:
    return {
        name: (p, p.data_ptr())
        for module in modules_within(fn, args, kwargs)
        for name, p in module.named_parameters()
        if p.device.type != "meta"
    }


def _rebound(
    fn: Any,
    before: Mapping[str, tuple[Tensor, int]],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    programs: Sequence[Program],
) -> list[Finding]:
    """Find parameters whose memory after the call is not the memory before it."""
    now = {n: p for module in modules_within(fn, args, kwargs) for n, p in module.named_parameters()}
    return [
        Finding(
            "rebound_parameter",
            name,
            _line_of_rebinding(name, programs) or defined_at(fn),
            "The call gives the parameter other memory (.data = …, or a new Parameter). A CUDA graph recorded with the "
            "old address is then recorded again at every step.",
            "Write into its memory under torch.no_grad(): parameter.copy_(new) or parameter.mul_(…).",
        )
        for name, (parameter, address) in before.items()
        if name in now and (now[name] is not parameter or parameter.data_ptr() != address)
    ]


def _line_of_rebinding(name: str, programs: Sequence[Program]) -> str:
    """Return the line where a graph gives the parameter `name` other memory; "" if no graph shows it."""
    for program in programs:
        for node in program.graph.graph.nodes:
            if node.op == "call_function" and op_name(node.target) == "set_" and isinstance(node.args[0], fx.Node):
                written = program.input_names.get(node.args[0].name, "").replace("/", ".")
                if written == name or written.endswith(f".{name}"):
                    return user_line(node)
    return ""
