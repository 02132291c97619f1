"""Make one region of what a graph ends with, its final writes into inputs included.

    new = w - lr * g                                 invoke_subgraph(region_0, w, lr, g, n)
    n1 = n + 1                                ->
    w.copy_(new); n.copy_(n1)                        inside: the four calls above

A training step ends with its optimizer and the writes of what that has computed. A compiler that sees both writes in
place; apart, each write is another pass over the state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ._cost import launches
from ._graph import calls, is_view, tensor_of
from ._pass import PassReport
from ._region import call_region, may_be_in_a_region, run_of
from .outline_runs import unpack_at_once

_WRITE = torch.ops.aten.copy_.default


def outline_tail(
    graph_module: fx.GraphModule, *, may_hold: Callable[[fx.Node], bool] = lambda node: True
) -> PassReport:
    """Replace the longest run of calls that the graph ends with by a call of a region, in place.

    In it are pure calls, and ``copy_`` into inputs of the graph or views of them. Exact: the same operators run on the
    same tensors, in the same order. A view of an input that the region writes is made again inside, so that a compiler
    sees what lies in one memory. Where nothing is written at the end, nothing changes. Nobody may read what the call
    gives: ``eliminate_dead_code`` must be told that it has an effect.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.
        may_hold: Which calls may be in the region. The run begins behind the last one that may not.

    Returns:
        The report; `changed` is 1 where there is such a region.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import outline_tail
        >>> def step(w, g):
        ...     w.copy_(w - g * 0.1)
        >>> outline_tail(make_fx(step, tracing_mode="fake")(torch.ones(2), torch.ones(2))).changed
        1
    """
    graph = graph_module.graph
    before = len(calls(graph))
    unpack_at_once(graph)
    tail: list[fx.Node] = []
    for node in reversed(calls(graph)):
        if not may_hold(node) or not (may_be_in_a_region(node) or _is_final_write(node)):
            break
        tail.insert(0, node)
    # What unpacks a tuple, or reads what is no tensor, stays outside with all before it.
    while (run := run_of(tail)).inputs and not all(tensor_of(n) is not None for n in run.inputs):
        odd = {n for n in run.inputs if tensor_of(n) is None}
        tail = tail[1 + max(at for at, node in enumerate(tail) if odd.intersection(node.all_input_nodes)) :]
    written = {root for node in tail if _is_final_write(node) and (root := _root(node.all_input_nodes[0])) is not None}
    if not written or sum(map(launches, tail)) < 2 or not run.has_tensors_only():
        return PassReport("outline_tail", True, 0, before, before)
    tail = _views_again(graph, tail, run.inputs, written) + tail
    call_region(graph_module, [run_of(tail)])
    graph.lint()
    graph_module.recompile()
    return PassReport("outline_tail", True, 1, before, len(calls(graph)))


def _is_final_write(node: fx.Node) -> bool:
    return node.target is _WRITE and not node.users and _root(node.all_input_nodes[0]) is not None


def _root(node: fx.Node) -> fx.Node | None:
    """The input of the graph that `node` is, or is a view of."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node if node.op == "placeholder" else None


def _views_again(graph: fx.Graph, tail: list[fx.Node], inputs: tuple[fx.Node, ...], of: set[fx.Node]) -> list[fx.Node]:
    """Copies, in front of `tail`, of the views of `of` among its `inputs`, which `tail` then reads."""
    again: dict[fx.Node, fx.Node] = {}
    inside = set(tail)
    for node in inputs:
        chain: list[fx.Node] = []
        at = node
        while is_view(at) and _root(node) in of:
            chain.insert(0, at)
            at = at.all_input_nodes[0]
        for view in chain:
            if view not in again:
                with graph.inserting_before(tail[0]):
                    again[view] = graph.node_copy(view, lambda n: again.get(n, n))
        if chain:
            node.replace_all_uses_with(again[node], delete_user_cb=lambda user: user in inside)
    return list(again.values())
