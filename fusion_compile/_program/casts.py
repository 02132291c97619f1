"""A weight is cast to a lower precision once in a program, however often it is used.

Autocast casts where an operator takes a weight. Its cache of casts would add the gradients of a weight that is used
twice in the lower precision, so a capture has none, and a tied weight, a loop over one block and every micro-batch cast
again: six bytes an entry each time. Two casts of one value are one here; each use keeps its own gradient, in fp32.

What checkpointing computes again casts again, as it does in a loop without a compiler, and a micro-batch after it, too:
the casts would be held for that long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fusion_compile._program.program import region_of
from fusion_compile._program.recomputation import region_of_recomputed

_COMPUTED = ("forward", "backward")
_ALIASES = frozenset({torch.ops.aten.detach.default, torch.ops.aten.alias.default})
_CASTS = frozenset({torch.ops.prims.convert_element_type.default, torch.ops.aten._to_copy.default})


def merge_casts(graph: fx.Graph) -> int:
    """Let equal casts of one weight be one node, in a graph that writes nothing before its end. How many are gone.

    A weight is what the forward and the backward do not compute: a view of a bank, the gradient point.
    """
    first: dict[Any, fx.Node] = {}
    gone, backwards, region = 0, 0, ""
    lets_go = any(region_of_recomputed(node) for node in graph.nodes)
    for node in list(graph.nodes):
        if (now := region_of(node)) in _COMPUTED:
            backwards += lets_go and (region, now) == ("backward", "forward")
            region = now
        if node.op != "call_function" or node.target not in _CASTS or not node.args:
            continue
        source = node.args[0]
        while isinstance(source, fx.Node) and source.target in _ALIASES:  # each micro-batch has a leaf of its own
            source = source.args[0]
        if not isinstance(source, fx.Node) or region_of(source) in _COMPUTED:
            continue
        which = (str(node.target), repr(node.args[1:]), repr(node.kwargs), region_of_recomputed(node), backwards)
        kept = first.setdefault((source, which), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
            gone += 1
    return gone
