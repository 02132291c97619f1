"""Make regions of the calls between regions, so that only calls of regions, and views, are left in the graph.

    p = conv2d(image, w); x = p + position           x = invoke_subgraph(region_1, image, w, position)
    x1 = invoke_subgraph(region_0, x, w0)      ->    x1 = invoke_subgraph(region_0, x, w0)
    x2 = invoke_subgraph(region_0, x1, w1)           x2 = invoke_subgraph(region_0, x1, w1)
    y = linear(gelu(x2), v)                          y = invoke_subgraph(region_2, x2, v)

A graph in this form is compiled region by region, in a time that does not depend on its depth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from ._cost import launches
from ._graph import calls, tensor_of, value_of
from ._pass import PassReport
from ._region import call_region, may_be_in_a_region, metadata, run_of

_LEAST_LAUNCHES = 2
"""A single kernel has nothing to fuse with."""

_MOST_INPUTS = 32
"""Calls that read more tensors, as the concatenation of a row does, are left alone: compiled, such a call would be a
loop for each tensor, and their number grows with depth."""


def outline_runs(
    graph_module: fx.GraphModule, *, may_hold: Callable[[fx.Node], bool] = lambda node: True
) -> PassReport:
    """Replace each longest run of pure calls that starts two kernels or more by a call of a region, in place.

    Exact: the same operators run on the same tensors, in the same order. Equal runs share a region. Calls that draw
    random numbers, have an effect, give sizes known only at run time, read very many tensors or what is no tensor stay
    where they are, and so do views and kernels that stand alone.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.
        may_hold: Which calls may be in a region.

    Returns:
        The report; `changed` counts calls of regions.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import outline_runs
        >>> outline_runs(make_fx(lambda x: x.sin() + x.cos(), tracing_mode="fake")(torch.ones(2))).changed
        1
    """
    graph = graph_module.graph
    before = len(calls(graph))
    unpack_at_once(graph)
    kinds: dict[Any, list[list[fx.Node]]] = {}
    for nodes in _runs(graph, may_hold):
        run = run_of(nodes)
        if run.has_tensors_only():
            kinds.setdefault((run.wiring, tuple(metadata(value_of(n)) for n in run.inputs)), []).append(nodes)
    for several in kinds.values():
        call_region(graph_module, [run_of(nodes) for nodes in several])  # again: by now they may read other regions
    graph.lint()
    graph_module.recompile()
    return PassReport("outline_runs", True, sum(map(len, kinds.values())), before, len(calls(graph)))


def unpack_at_once(graph: fx.Graph) -> None:
    """Move the unpacking of a tuple right behind the call that gives it, so that no run ends between them."""
    for node in reversed(graph.find_nodes(op="call_function", target=operator.getitem)):
        if _is_tuple(node.args[0]):
            node.args[0].append(node)


def _runs(graph: fx.Graph, may_hold: Callable[[fx.Node], bool]) -> list[list[fx.Node]]:
    """Longest runs of neighbours that may be in a region together and start `_LEAST_LAUNCHES` kernels."""
    runs: list[list[fx.Node]] = [[]]
    for node in calls(graph):
        apart = not may_hold(node) or not may_be_in_a_region(node) or len(node.all_input_nodes) > _MOST_INPUTS
        if apart or any(tensor_of(n) is None and n not in runs[-1] for n in node.all_input_nodes):
            runs.append([])
        else:
            runs[-1].append(node)
    return [run for run in runs if sum(map(launches, run)) >= _LEAST_LAUNCHES]


def _is_tuple(value: Any) -> bool:
    return isinstance(value, fx.Node) and tensor_of(value) is None
