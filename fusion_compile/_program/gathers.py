"""Weights that are gathered from other ranks lie in memory while they are used, and not between forward and backward.

As a step is written, it gathers all weights first. A graph tells where each piece of them is used: it is gathered just
before that, once for the forward and again for the backward, so that it can be freed in between. What checkpointing
computes again belongs to the backward.
"""

from __future__ import annotations

import torch
from torch import fx

from fusion_compile._program.program import region_of

aten = torch.ops.aten

_GATHER = "all_gather_into_tensor"
_MOVES = frozenset(
    {
        aten.cat.default,
        aten.clone.default,
        aten._to_copy.default,
        aten.stack.default,
        aten._unsafe_view.default,
        torch.ops.prims.convert_element_type.default,
    }
)
"""Operators that compute nothing of what was gathered, besides views."""


def has_gathers(graph: fx.Graph) -> bool:
    """Whether `graph` gathers anything."""
    return any(_GATHER in str(node.target) for node in graph.nodes if node.op == "call_function")


def gather_late(graph: fx.Graph) -> int:
    """Gather weights where they are used, in place; how many gathers there are more than before.

    Before: ``w = all_gather(own); forward(w); backward(w)``. After: ``w = all_gather(own); forward(w);
    again = all_gather(own); backward(again)``. Exact: ranks send the same again. Only what the forward uses is
    touched, and a second run changes nothing.
    """
    weights = _weights(graph)
    gathers = [node for node in weights if _GATHER in str(node.target)]
    copies: dict[tuple[int, fx.Node], fx.Node] = {}
    phase, region = 0, "forward"
    for node in list(graph.nodes):
        if (now := region_of(node)) in ("forward", "backward"):
            phase += now != region
            region = now
        if node in weights:
            continue
        for source in node.all_input_nodes:
            if source in weights:
                with graph.inserting_before(node):
                    node.replace_input_with(source, _copied(graph, source, phase, weights, copies))
    for node in reversed(weights):
        graph.erase_node(node)
    return sum(_GATHER in str(node.target) for node in copies.values()) - len(gathers)


def _weights(graph: fx.Graph) -> dict[fx.Node, None]:
    """Gathers of what the forward uses, and what is made of them without computing, in the graph's order."""
    of: dict[fx.Node, set[fx.Node]] = {}
    used: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        sources = node.all_input_nodes
        if _GATHER in str(node.target):
            of[node] = {node}
        elif sources and all(source in of for source in sources) and _moves(node):
            of[node] = set().union(*(of[source] for source in sources))
        elif region_of(node) == "forward":
            used |= set().union(*(of[source] for source in sources if source in of))
    return {node: None for node, gathers in of.items() if gathers <= used}


def _moves(node: fx.Node) -> bool:
    return node.target in _MOVES or "wait_tensor" in str(node.target) or bool(getattr(node.target, "is_view", False))


def _copied(
    graph: fx.Graph,
    node: fx.Node,
    phase: int,
    weights: dict[fx.Node, None],
    copies: dict[tuple[int, fx.Node], fx.Node],
) -> fx.Node:
    """`node` as it is in `phase`, made now if it is not there yet."""
    if (phase, node) not in copies:
        made = {s: _copied(graph, s, phase, weights, copies) for s in node.all_input_nodes if s in weights}
        copies[phase, node] = graph.node_copy(node, lambda source: made.get(source, source))
    return copies[phase, node]
