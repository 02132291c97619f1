"""The account of one value of a program: where it is computed, from what, and why there."""

from __future__ import annotations

import difflib

from fusion_compile.explain._facts import ExplanationFacts, GraphFacts, HoistedValue, NodeFacts
from fusion_compile.explain._findings import identity

_LONGEST = 24


def tell_why(explanation: ExplanationFacts, name: str) -> str:
    """Return the account of every node and weight called `name`; see `Explanation.why`."""
    hoisted = [v for v in (explanation.hoisting.values if explanation.hoisting else ()) if v.name == name]
    nodes = [(graph, i) for graph in explanation.graphs for i, n in enumerate(graph.nodes) if n.name == name]
    if not nodes:
        nodes = [(g, i) for g in explanation.graphs for i, n in enumerate(g.nodes) if n.module == name and n.flops]
    if not hoisted and not nodes:
        known = {n.name for g in explanation.graphs for n in g.nodes}
        known |= {v.name for v in (explanation.hoisting.values if explanation.hoisting else ())}
        near = difflib.get_close_matches(name, sorted(known), n=5, cutoff=0.4)
        raise KeyError(
            f"there is no {name!r} in {explanation.title}; the nearest names are {', '.join(near) or 'none'}."
        )
    accounts = [_of_hoisting(value) for value in hoisted]
    accounts += [_of_node(explanation, graph, i) for graph, i in nodes]
    return "\n\n".join(accounts)


def _of_hoisting(value: HoistedValue) -> str:
    lines = [
        f"{value.name}: {value.kind} known at {value.binding_time}; {value.decision.replace('_', ' ')}. {value.reason}",
        f"  {value.bytes:,} bytes, {value.flops:,} FLOP"
        + (f"; frees {value.frees_bytes:,} bytes of weights" if value.frees_bytes else ""),
    ]
    if value.chain:
        lines.append("  because of " + " -> ".join(value.chain))
    return "\n".join(lines)


def _of_node(explanation: ExplanationFacts, graph: GraphFacts, at: int) -> str:
    node = graph.nodes[at]
    users = [n.name for n in graph.nodes if at in n.inputs]
    place = ", ".join(filter(None, (node.region, node.module, node.where)))
    lines = [
        f"{node.name}: {node.op} in {graph.name}, {place}",
        f"  {node.dtype}[{', '.join(map(str, node.shape))}]; {node.flops:,} FLOP, {node.bytes_read:,} bytes read, "
        f"{node.bytes_written:,} written, at least {node.microseconds:.3g} µs",
        f"  read by {', '.join(users[:8]) or 'nothing'}{f' and {len(users) - 8} more' if len(users) > 8 else ''}",
    ]
    if node.recomputed:
        lines.append(f"  computed again for the backward: checkpointed region {node.recomputed}")
    if node.inputs:
        lines.append("  from " + " <- ".join(_chain(graph, node)))
    lines += [f"  {finding}" for finding in explanation.findings if identity(finding) == node.finding]
    return "\n".join(lines)


def _chain(graph: GraphFacts, node: NodeFacts) -> list[str]:
    """Follow the first operand that was computed, from `node` back to an input."""
    names: list[str] = []
    while node.inputs and len(names) < _LONGEST:
        sources = [graph.nodes[i] for i in node.inputs]
        node = next((s for s in sources if s.inputs), sources[0])
        names.append(f"{node.name} ({node.module})" if node.module else node.name)
    return names
