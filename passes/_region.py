"""A region: a run of calls as a submodule of its graph, called by ``invoke_subgraph`` in place of every equal run.

Weights, and everything else that differs from copy to copy, are inputs of the region. Its outputs own their memory:
views that lead out of it are made again outside, from the tensors they are views of.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ._compat import invoke_subgraph
from ._graph import MAY_COPY, impurity, is_assertion, is_static, is_view, op_name, tensor_of, value_of


@dataclass(frozen=True)
class Run:
    """One occurrence: `nodes` in graph order, and the nodes that they read from outside, in order of first use."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    wiring: tuple[Any, ...]
    """Operators, constants and which reads what: equal for runs that compute the same."""

    def passed(self) -> list[fx.Node]:
        """The nodes that something after the run reads."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]

    def sources(self, node: fx.Node) -> list[int]:
        """The index in the run of the tensor whose memory `node` may share; nothing if that came in from outside."""
        inside = {n: at for at, n in enumerate(self.nodes)}
        while may_share(node) and node in inside:
            node = node.all_input_nodes[0]
        return [inside[node]] if node in inside else []

    def given(self) -> list[int]:
        """The indices in the run of the tensors that a region of it must return."""
        return sorted({at for node in self.passed() for at in self.sources(node)})

    def has_tensors_only(self) -> bool:
        """Whether only tensors come in and go out."""
        return all(tensor_of(n) is not None for n in (*self.inputs, *(self.nodes[at] for at in self.given())))


def run_of(nodes: Sequence[fx.Node]) -> Run:
    """The run of `nodes`, in graph order, with its inputs and wiring."""
    names: dict[fx.Node, Any] = {node: at for at, node in enumerate(nodes)}
    inputs: list[fx.Node] = []
    wiring = []
    for node in nodes:
        for source in node.all_input_nodes:
            if source not in names:
                names[source] = ("input", len(inputs))
                inputs.append(source)
        wiring.append(written(node, names.__getitem__))
    return Run(tuple(nodes), tuple(inputs), tuple(wiring))


def may_be_in_a_region(node: fx.Node) -> bool:
    """Whether `node` only computes from tensors of known sizes: no effect, check, random number or region."""
    if node.op != "call_function" or node.target is invoke_subgraph or impurity(node) or is_assertion(node):
        return False
    return all(value is None or is_static(value) for value in map(tensor_of, (node, *node.all_input_nodes)))


def call_region(graph_module: fx.GraphModule, runs: Sequence[Run]) -> None:
    """Make a region of the first of `runs`, which have equal wiring, and call it in place of each."""
    name = _free_name(graph_module)
    given = sorted({at for run in runs for at in run.given()})
    region = _extract(graph_module, runs[0], given)
    graph_module.add_submodule(name, region)
    read = _drop_unread_inputs(region)
    now: dict[fx.Node, fx.Node] = {}
    for run in runs:
        now |= _replace(graph_module.graph, name, replace(run, inputs=tuple(run.inputs[at] for at in read)), given, now)


def count_regions(graph_module: fx.GraphModule) -> dict[str, int]:
    """Count how often a graph calls each region.

    Args:
        graph_module: A graph after `fold_repeated_regions` or `outline_runs`.

    Returns:
        Name of a region -> number of calls.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import count_regions, outline_runs
        >>> graph_module = make_fx(lambda x: x.sin() + x.cos(), tracing_mode="fake")(torch.ones(2))
        >>> _ = outline_runs(graph_module)
        >>> count_regions(graph_module)
        {'region_0': 1}
    """
    counts: dict[str, int] = {}
    for node in graph_module.graph.find_nodes(op="call_function", target=invoke_subgraph):
        counts[node.args[1]] = counts.get(node.args[1], 0) + 1
    return counts


def may_share(node: fx.Node) -> bool:
    """Whether the result of `node` may lie in the memory of its first argument; a region must return its own memory."""
    return is_view(node) or (node.op == "call_function" and op_name(node.target) in MAY_COPY)


def written(node: fx.Node, name: Callable[[fx.Node], Any]) -> tuple[Any, ...]:
    """Operator and arguments as something that compares and hashes, with each node replaced by its `name`."""

    def freeze(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", name(value))
        if isinstance(value, (tuple, list)):
            return tuple(map(freeze, value))
        if isinstance(value, dict):
            return tuple((k, freeze(v)) for k, v in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
        return (type(value), value.hex() if isinstance(value, float) else value)

    return (node.target, freeze(node.args), freeze(node.kwargs))


def metadata(value: Any) -> Any:
    """The properties of `value` that a compiled region assumes, as something that compares and hashes."""
    if isinstance(value, Tensor):
        return (value.dtype, value.device, tuple(value.shape), tuple(value.stride()))
    if isinstance(value, (tuple, list)):
        return tuple(map(metadata, value))
    return type(value)


def _extract(graph_module: fx.GraphModule, run: Run, given: list[int]) -> fx.GraphModule:
    """`run` as a graph of its own that returns the nodes at `given`."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for at, source in enumerate(run.inputs):
        values[source] = graph.placeholder(f"input_{at}")
        values[source].meta.update(source.meta)
    for node in run.nodes:
        values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(tuple(values[run.nodes[at]] for at in given))
    graph.eliminate_dead_code()
    return fx.GraphModule(graph_module, graph)


def _drop_unread_inputs(region: fx.GraphModule) -> list[int]:
    """Take inputs away that led only to views, which are made outside; the indices of those that are left."""
    inputs = region.graph.find_nodes(op="placeholder")
    read = [at for at, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            region.graph.erase_node(node)
    region.recompile()
    return read


def _replace(
    graph: fx.Graph, name: str, run: Run, given: list[int], now: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Call the region in place of `run`; return old node -> new node. `now`: the same of earlier runs."""
    passed = run.passed()
    inside = set(run.nodes)
    inputs = tuple(now.get(source, source) for source in run.inputs)
    with graph.inserting_after(run.nodes[-1]):
        region = graph.get_attr(name)
    with graph.inserting_after(region):
        last = call = graph.call_function(invoke_subgraph, (region, name, *inputs))
    key = "val" if "val" in run.nodes[-1].meta else "example_value"
    call.meta[key] = tuple(value_of(run.nodes[at]) for at in given)
    stands_for: dict[fx.Node, fx.Node] = {}
    for item, at in enumerate(given):
        with graph.inserting_after(last):
            last = stands_for[run.nodes[at]] = graph.call_function(operator.getitem, (call, item))
        last.meta.update(run.nodes[at].meta)
    for node in passed:
        for view in _views(node, inside):
            if view not in stands_for:
                with graph.inserting_after(last):
                    last = stands_for[view] = graph.node_copy(view, lambda n: stands_for.get(n, now.get(n, n)))
    for node in passed:
        node.replace_all_uses_with(stands_for[node], delete_user_cb=lambda user: user not in inside)
    for node in reversed(run.nodes):
        graph.erase_node(node)
    return stands_for


def _views(node: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """The views among `inside` that lead to `node`, the one nearest to their root first."""
    chain: list[fx.Node] = []
    while may_share(node) and node in inside:
        chain.insert(0, node)
        node = node.all_input_nodes[0]
    return chain


def _free_name(graph_module: fx.GraphModule) -> str:
    at = 0
    while hasattr(graph_module, f"region_{at}"):
        at += 1
    return f"region_{at}"
