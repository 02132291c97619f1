"""An ATen graph as a table: each node with its source line and costs, and the sums over regions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set

from torch import fx

from fusion_compile._program.program import recomputed_region
from fusion_compile.explain._facts import INPUT, GraphFacts, NodeFacts, RegionFacts
from fusion_compile.explain._findings import WAITS, identity
from fusion_compile.explain._graph.costs import bytes_moved, flops, launches, main_dtype, number, tensors_of, touched
from fusion_compile.explain._graph.memory import memory_of
from fusion_compile.explain._graph.roofline import ROOFLINES, Roofline
from fusion_compile.passes import BindingTime, Finding, find_host_syncs
from fusion_compile.passes._graph import op_name
from fusion_compile.passes._user_frame import user_line


def graph_facts(
    title: str,
    module: fx.GraphModule,
    line: Roofline,
    *,
    region: Callable[[fx.Node], str],
    input_names: Mapping[str, str] | None = None,
    findings: Sequence[Finding] = (),
    times: Mapping[str, BindingTime] | None = None,
    root: str = "",
) -> GraphFacts:
    """Make the table of `module`, whose nodes carry fake tensors in ``meta["val"]``.

    `line`: the roofline for the times; an operator on the CPU takes that of one CPU core.
    `region`: returns the region of a call. `input_names`: names for its inputs.
    `findings`: those about a node's line and operator are linked to it. `times`: binding times by node name. `root`:
    common prefix of all module names, which is removed.
    """
    nodes = [n for n in module.graph.nodes if n.op != "output"]
    index = {n: i for i, n in enumerate(nodes)}
    waits = {(f.where, f.op) for f in find_host_syncs(module)}
    titles = input_names or {}
    on_gpu = any(tensor.device.type not in ("cpu", "meta") for node in nodes for tensor in tensors_of(node))
    facts = []
    for node in nodes:
        where, path = user_line(node), module_path(node).removeprefix(root)
        read, written = bytes_moved(node)
        operations = flops(node)
        moved = read + written
        tensor = next(tensors_of(node), None)
        time = None if times is None else times.get(node.name)
        op = node.op
        if node.op == "call_function":
            op = str(node.target) if hasattr(node.target, "_schema") else op_name(node.target)
        name = titles.get(node.name, node.name)
        finding = _finding(findings, where, {op, name, op_name(node.target)}, (where, op) in waits)
        own_line = line
        if not line.is_cpu and (_on_the_cpu(node, on_gpu) or (finding or "").startswith("cpu_tensor")):
            own_line = ROOFLINES["cpu"]
        facts.append(
            NodeFacts(
                name=name,
                op=op,
                region=region(node) if node.op == "call_function" else INPUT,
                module=path,
                where=where,
                dtype="" if tensor is None else str(tensor.dtype).removeprefix("torch."),
                shape=() if tensor is None else tuple(n if isinstance(n, int) else str(n) for n in tensor.shape),
                flops=operations,
                bytes_read=read,
                bytes_written=written,
                intensity=operations / moved if moved else 0.0,
                microseconds=own_line.microseconds(operations, moved, main_dtype(node)),
                launches=launches(node),
                inputs=tuple(index[s] for s in node.all_input_nodes),
                binding_time=None if time is None else time.name.lower(),
                finding=finding,
                recomputed=recomputed_region(node),
            )
        )
    names = {node: (fact.name, fact.where) for node, fact in zip(nodes, facts, strict=True)}
    memory = memory_of(module, nodes, names)
    return GraphFacts(title, _regions(facts), _edges(nodes, facts), tuple(facts), memory)


def _on_the_cpu(node: fx.Node, on_gpu: bool) -> bool:
    """Whether `node` of a program that runs on a GPU runs on the CPU."""
    tensors = [t for each in (node, *node.all_input_nodes) for t in tensors_of(each)]
    return on_gpu and bool(tensors) and all(t.device.type == "cpu" for t in tensors)


def _finding(findings: Sequence[Finding], where: str, names: Set[str], waits: bool) -> str | None:
    """Return the identity of the first finding about a node with that line and one of those names.

    A node that `waits` matches any wait on its line, because the captured graph and ATen's name it differently.
    """
    for finding in findings:
        if finding.where == where and where and (finding.op in names or (waits and finding.kind in WAITS)):
            return identity(finding)
    return None


def module_path(node: fx.Node) -> str:
    """Return the full name of the module that called `node`, ``"blocks.0.attn"``; "" for the outermost or none."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack.values()]
    if not entries:  # captured by running
        return str((node.meta.get("custom") or {}).get("module", ""))
    return _readable(entries[-1])


def _readable(path: str) -> str:
    """Turn Dynamo's expression for a module into a name: ``getattr(L['self'].blocks, '0').mlp`` -> ``blocks.0.mlp``."""
    before = None
    while before != path:
        before = path
        path = re.sub(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", path)
    path = re.sub(r"\._modules\['([^']*)'\]|\[(?:'([^']*)'|(\d+))\]", lambda m: "." + (m[1] or m[2] or m[3]), path)
    path = re.sub(r"^.*\.cell_contents(\.model)?(\.|$)|^[LG]\.(self|explained)(\.__self__)?(\.|$)|^[LG]\.", "", path)
    return path


def _regions(facts: Sequence[NodeFacts]) -> tuple[RegionFacts, ...]:
    groups: dict[str, list[NodeFacts]] = {}
    for fact in facts:
        if fact.region != INPUT:
            groups.setdefault(fact.region, []).append(fact)
    return tuple(
        RegionFacts(
            name,
            nodes=len(group),
            launches=sum(f.launches for f in group),
            flops=sum(f.flops for f in group),
            bytes=sum(f.bytes_read + f.bytes_written for f in group),
            microseconds=sum(f.microseconds for f in group),
        )
        for name, group in groups.items()
    )


def _edges(nodes: Sequence[fx.Node], facts: Sequence[NodeFacts]) -> tuple[tuple[str, str, int], ...]:
    """Return the bytes that each region reads from each other one. A value read twice in a region counts once."""
    crossing: dict[tuple[str, str], dict[fx.Node, int]] = {}
    for node, fact in zip(nodes, facts, strict=True):
        for source, i in zip(node.all_input_nodes, fact.inputs, strict=True):
            if facts[i].region != fact.region:
                size = sum(map(touched, tensors_of(source)))
                crossing.setdefault((facts[i].region, fact.region), {})[source] = size
    return tuple((a, b, number(sum(values.values()))) for (a, b), values in crossing.items())
