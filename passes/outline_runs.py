"""Make regions of what lies between regions, so that nothing is left in the graph but calls of regions, and views.

    p = conv2d(image, w); x = p + position           x = invoke_subgraph(region_1, image, w, position)
    x1 = invoke_subgraph(region_0, x, w0)      ->    x1 = invoke_subgraph(region_0, x, w0)
    x2 = invoke_subgraph(region_0, x1, w1)           x2 = invoke_subgraph(region_0, x1, w1)
    y = linear(gelu(x2), v)                          y = invoke_subgraph(region_2, x2, v)

A graph in that form is compiled region by region, in a time that its depth does not change.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ._cost import launches
from ._graph import calls, tensor_of, value_of
from ._pass import PassReport
from ._region import call_region, may_be_in_a_region, metadata, run_of

_LEAST_LAUNCHES = 2
"""A single kernel has nothing to be fused with."""

_MOST_INPUTS = 32
"""What reads more tensors, as the concatenation of a row does, is left alone: compiled, it would be one loop for each,
and their number grows with depth."""


def outline_runs(graph_module: fx.GraphModule) -> PassReport:
    """Replace each longest run of pure calls that starts two kernels or more by a call of a region, in place; equal
    runs share one.

    Exact: the same operators run on the same tensors, in the same order. What draws numbers, has an effect, gives sizes
    known at run time only or reads very many tensors stays where it is, and so do views and kernels that stand alone.
    `changed` counts calls of regions.
    """
    graph = graph_module.graph
    before = len(calls(graph))
    _unpack_at_once(graph)
    kinds: dict[Any, list[list[fx.Node]]] = {}
    for nodes in _runs(graph):
        run = run_of(nodes)
        if run.has_tensors_only():
            kinds.setdefault((run.wiring, tuple(metadata(value_of(n)) for n in run.inputs)), []).append(nodes)
    for several in kinds.values():
        call_region(graph_module, [run_of(nodes) for nodes in several])  # again: by now they may read other regions
    graph.lint()
    graph_module.recompile()
    return PassReport("outline_runs", True, sum(map(len, kinds.values())), before, len(calls(graph)))


def _unpack_at_once(graph: fx.Graph) -> None:
    """Place what unpacks a tuple right behind what gives it: no run ends between them."""
    for node in reversed(graph.find_nodes(op="call_function", target=operator.getitem)):
        if _is_tuple(node.args[0]):
            node.args[0].append(node)


def _runs(graph: fx.Graph) -> list[list[fx.Node]]:
    """Neighbours that may be in a region together, where they start `_LEAST_LAUNCHES`."""
    runs: list[list[fx.Node]] = [[]]
    for node in calls(graph):
        unpacked = node.args[0] if node.target is operator.getitem else None
        apart = not may_be_in_a_region(node) or len(node.all_input_nodes) > _MOST_INPUTS
        if apart or (_is_tuple(unpacked) and unpacked not in runs[-1]):
            runs.append([])
        else:
            runs[-1].append(node)
    return [run for run in runs if sum(map(launches, run)) >= _LEAST_LAUNCHES]


def _is_tuple(value: Any) -> bool:
    return isinstance(value, fx.Node) and tensor_of(value) is None
