"""What checkpointing computes again is computed when the gradient has come there, and not before.

A graph that was captured by running holds the recomputed nodes beside the ones that they repeat; where Dynamo read the
step, AOTAutograd puts them there. Nothing in their inputs says that they belong to the backward, so a compiler fuses a
recomputed normalization with its original and runs the matrix products behind it at once; all activations are then kept
until the backward, as if nothing were checkpointed.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from fusion_compile._program.program import recomputed_region, region_of


def recomputes(graph: fx.Graph) -> bool:
    """Whether some node of `graph` is marked as recomputed."""
    return any(region_of_recomputed(node) for node in graph.nodes)


def checkpoints(graph: fx.Graph) -> bool:
    """Whether `graph`, as Dynamo read it, calls activation checkpointing."""
    return any("activation_checkpoint" in str(n.target) for n in graph.nodes if n.op == "call_function")


def region_of_recomputed(node: fx.Node) -> int:
    """Which region `node` recomputes, from 1; 0 if it recomputes nothing.

    AOTAutograd's copies of checkpointed operators are marked as the originals are, and as the backward's besides.
    """
    if number := recomputed_region(node):
        return number
    is_copy = node.meta.get("autograd_backward") and node.meta.get("recompute") is not None
    return int(node.meta.get("ac_graph_id", 0)) + 1 if is_copy else 0


def waits_for_gradient(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For the first nodes of each recomputed region, the node that brings the gradient to that region.

    Views are left out: they compute nothing.
    """
    nodes = list(graph.nodes)
    regions: dict[int, list[fx.Node]] = {}
    for node in nodes:
        if number := region_of_recomputed(node):
            regions.setdefault(number, []).append(node)
    found: dict[fx.Node, fx.Node] = {}
    for inside in regions.values():
        gradient = _gradient_for(inside, nodes)
        if gradient is not None:
            found |= dict.fromkeys(_first_of(inside), gradient)
    return found


def _gradient_for(inside: Sequence[fx.Node], nodes: Sequence[fx.Node]) -> fx.Node | None:
    """What the first backward node that depends on `inside` reads besides, and that does not itself depend on it."""
    behind = set(inside)
    readers = []
    for node in nodes:
        if node not in behind and any(source in behind for source in node.all_input_nodes):
            behind.add(node)
            readers.append(node)
    for reader in readers:
        for source in reader.all_input_nodes:
            if source not in behind and _is_of_the_backward(source):
                return source
    return None


def _first_of(inside: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes of `inside` that compute something and whose inputs nothing in `inside` has computed."""
    computed: set[fx.Node] = set()
    first = []
    for node in inside:
        if any(source in computed for source in node.all_input_nodes):
            computed.add(node)
        elif not _is_view(node):
            computed.add(node)
            first.append(node)
    return first


def _is_of_the_backward(node: fx.Node) -> bool:
    return node.op == "call_function" and region_of(node) == "backward" and not region_of_recomputed(node)


def _is_view(node: fx.Node) -> bool:
    return node.target is operator.getitem or bool(getattr(node.target, "is_view", False))
