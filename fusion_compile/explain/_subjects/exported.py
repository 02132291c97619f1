"""The explanation of a graph that was captured elsewhere: an ExportedProgram or a GraphModule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._compat import fake_mode
from fusion_compile.explain._arguments import Invocation
from fusion_compile.explain._environment import environment
from fusion_compile.explain._explanation import Explanation
from fusion_compile.explain._facts import Kind
from fusion_compile.explain._findings import deduplicate
from fusion_compile.explain._graph.costs import tensors_of
from fusion_compile.explain._graph.graph_facts import graph_facts
from fusion_compile.explain._graph.roofline import roofline
from fusion_compile.explain._graph.static_findings import find_cpu_tensors
from fusion_compile.explain._show.summary import summarize
from fusion_compile.passes import find_host_syncs
from fusion_compile.passes._compat import tree_leaves
from fusion_compile.passes._graph import value_of


def explain_exported(program: ExportedProgram, device: str | None) -> Explanation:
    """Explain `program` in ATen's operators, with its inputs under their names in the module."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about itself (LeafSpec, 2.13)
        decomposed = program.run_decompositions({})
    lowered, own = _lower(decomposed.graph_module, ())
    targets = {spec.arg.name: spec.target for spec in decomposed.graph_signature.input_specs if spec.target}
    names = {name: targets.get(said, said) for name, said in own.items()}
    return _explain("exported_program", "ExportedProgram", lowered, names, device)


def explain_graph_module(module: fx.GraphModule, inputs: Invocation, device: str | None) -> Explanation:
    """Explain `module` in ATen's operators, traced on fakes of `inputs` or on the fake tensors that its nodes carry.

    Raise ValueError if there are neither.
    """
    if inputs.kwargs:
        raise TypeError(
            f"explain() got {', '.join(inputs.kwargs)} for a GraphModule; give its inputs in order, in one tuple: "
            "explain(graph_module, (x, y))."
        )
    lowered, names = _lower(module, inputs.args)
    return _explain("graph_module", type(module).__name__, lowered, names, device)


def _explain(
    kind: Kind, title: str, module: fx.GraphModule, names: Mapping[str, str], device: str | None
) -> Explanation:
    devices = {t.device for n in module.graph.nodes for t in tensors_of(n)}
    placed = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    line = roofline(device, placed)
    findings = deduplicate([*find_host_syncs(module), *find_cpu_tensors(module.graph, None, names)])
    graph = graph_facts("graph", module, line, region=lambda _: "forward", input_names=names, findings=findings)
    return Explanation(
        f"{title}, {sum(r.nodes for r in graph.regions)} calls",
        kind,
        environment(placed.type, str(line)),
        summary=summarize(findings, [graph]),
        findings=findings,
        graphs=(graph,),
    )


class _WithAttributes(fx.Interpreter):
    """Run a graph with given tensors in place of its module's."""

    def __init__(self, module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._tensors = tensors

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._tensors.get(target) if target in self._tensors else super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        prefix = f"{target}."
        own = {n.removeprefix(prefix): t for n, t in self._tensors.items() if n.startswith(prefix)}
        return torch.func.functional_call(self.fetch_attr(target), own, args, kwargs)


def _lower(module: fx.GraphModule, args: tuple[Any, ...]) -> tuple[fx.GraphModule, dict[str, str]]:
    inputs = module.graph.find_nodes(op="placeholder")
    examples = list(args) if args else [value_of(n) for n in inputs]
    if len(examples) != len(inputs) or any(e is None for e in examples):
        raise ValueError(
            f"the GraphModule takes {len(inputs)} inputs ({', '.join(n.name for n in inputs)}) and "
            f"{len(args)} were given{'' if args else ', and its nodes carry none'}; "
            f"call explain(graph_module, inputs) with a tuple of them."
        )
    fake = next((e.fake_mode for e in tree_leaves(examples) if hasattr(e, "fake_mode")), None) or fake_mode()

    def faked(value: Any) -> Any:
        return fake.from_tensor(value) if isinstance(value, Tensor) and not hasattr(value, "fake_mode") else value

    held = {n: faked(t) for n, t in (*module.named_parameters(), *module.named_buffers())}
    held |= {
        str(n.target): faked(t)
        for n in module.graph.find_nodes(op="get_attr")
        if isinstance(t := _attribute(module, str(n.target)), Tensor)
    }
    names = list(held)

    def run(*values: Any) -> Any:
        return _WithAttributes(module, dict(zip(names, values, strict=False))).run(*values[len(names) :])

    with fx.traceback.preserve_node_meta(), fake, torch.no_grad():
        lowered = make_fx(run)(*held.values(), *map(faked, examples))
    given = [*names, *(n.name for n in inputs)]
    placeholders = lowered.graph.find_nodes(op="placeholder")
    return lowered, {n.name: name for n, name in zip(placeholders, given, strict=True)}


def _attribute(module: fx.GraphModule, target: str) -> Any:
    found: Any = module
    for name in target.split("."):
        found = getattr(found, name, None)
    return found
