"""Choose which linear layers of a conditioning vector to factor: those that read a narrow curve through a large weight.

Layers are grouped by the vector they read, because a group shares mean and basis. Where two layers lie on one path from
the timestep, as the time MLP and the modulations do, the group that saves most is factored and the other layer stays,
so that factored layers read the true vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from ._compat import OpOverload
from ._dependence import BindingTime
from ._graph import calls, is_static, op_name, tensor_of

_RELABELS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "clone", "contiguous", "detach")
"""Operators that keep the rows of their input, in order, when the last dimension and the size are the same."""

_READS_WEIGHTS = ("linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "embedding", "index", "index_select", "gather")
"""Operators through which a timestep becomes a vector that was learned."""


@dataclass(frozen=True)
class LinearLayer:
    """``data @ matrix (+ bias)``; the matrix is ``[out, in]`` if `transposed`."""

    node: fx.Node
    data: fx.Node
    matrix: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """``(in, out)``."""
        matrix = tensor_of(self.matrix)
        assert matrix is not None
        rows, columns = matrix.shape
        return (columns, rows) if self.transposed else (rows, columns)


Groups = dict[fx.Node, list[LinearLayer]]
"""By the vector they read."""


def factorable_layers(
    graph: fx.Graph, times: Mapping[fx.Node, BindingTime], rank: int
) -> tuple[Groups, dict[str, str]]:
    """Return the layers that could be factored, by vector, and, by name, the reason why others could not."""
    most_rows = _batch(graph, times)
    groups: Groups = {}
    declined: dict[str, str] = {}
    for node in calls(graph):
        layer = _as_linear(node)
        if layer is None or times[layer.data] not in (BindingTime.STEP, BindingTime.STEP_REQUEST):
            continue
        why = _why_not(layer, times, rank, most_rows)
        if why is None:
            groups.setdefault(_root(layer.data), []).append(layer)
        else:
            declined[node.name] = why
    return groups, declined


def _as_linear(node: fx.Node) -> LinearLayer | None:
    if not isinstance(node.target, OpOverload) or node.kwargs:
        return None
    name, nodes = op_name(node.target), [a if isinstance(a, fx.Node) else None for a in node.args]
    data, matrix, bias = None, None, None
    if name == "linear":
        data, matrix, bias = (*nodes, None)[:3]
    elif name in ("mm", "matmul"):
        data, matrix = nodes
    elif name == "addmm" and len(nodes) == 3:
        bias, data, matrix = nodes
    shape = None if matrix is None else tensor_of(matrix)
    if data is None or matrix is None or shape is None or shape.dim() != 2:
        return None
    return LinearLayer(node, data, matrix, bias, name == "linear")


def _why_not(layer: LinearLayer, times: Mapping[fx.Node, BindingTime], rank: int, most_rows: int) -> str | None:
    data, out = tensor_of(layer.data), tensor_of(layer.node)
    if any(times[n] is not BindingTime.CONST for n in (layer.matrix, layer.bias) if n is not None):
        return "its weight is not a constant."
    if data is None or out is None or not is_static(data) or not is_static(out):
        return "its sizes are symbolic; export the graph for one shape."
    width, columns = layer.sizes
    rows = data.numel() // width
    if rank >= min(width, columns):
        return f"rank {rank} is not below the sizes of its weight, [{columns}, {width}]."
    if rows > most_rows:
        return (
            f"its input has {rows} rows for a batch of {most_rows}: so many curves do not lie in one subspace of rank "
            f"{rank}. It is computed at every step."
        )
    if rank + rows >= width:
        return f"a factor of rank {rank} and an offset of {rows} rows take no less than its weight of width {width}."
    if not any(times[n].per_step and op_name(n.target) in _READS_WEIGHTS for n in ancestors([layer.data])):
        return "its input is a formula of the timestep, like sinusoids, and moves in all directions; it stays exact."
    if (reader := _other_reader(layer)) is not None:
        return f"its weight is also read by {reader.name}, so it would stay in memory."
    return None


def _other_reader(layer: LinearLayer) -> fx.Node | None:
    """A node that reads the weight of `layer` for something else."""
    chain = set(ancestors([layer.matrix]))
    return next((u for n in chain for u in n.users if u not in chain and u is not layer.node), None)


def choose_groups(groups: Groups, rank: int, declined: dict[str, str]) -> Groups:
    """Choose the groups that save most; of two layers on one path only one is factored."""
    chosen: Groups = {}
    behind = {root: set(ancestors([root])) for root in groups}
    for root, layers in sorted(groups.items(), key=lambda item: -_saved(item[0], item[1], rank)):
        above = {layer.node for taken in chosen.values() for layer in taken} & behind[root]
        kept = []
        for layer in layers:
            reader = next((other for other in chosen if layer.node in behind[other]), None)
            if above:
                name = min(n.name for n in above)
                declined[layer.node.name] = f"its input comes from {name}, which is factored; it is computed exactly."
            elif reader is not None:
                declined[layer.node.name] = (
                    f"it computes {reader.name}, which {len(chosen[reader])} factored layers read; it stays exact."
                )
            else:
                kept.append(layer)
        if kept and _saved(root, kept, rank) > 0:
            chosen[root] = kept
        elif kept:
            why = f"mean and basis of its input, shared by {len(kept)} layers, take what their factors save."
            declined.update({layer.node.name: why for layer in kept})
    return {root: chosen[root] for root in groups if root in chosen}


def _saved(root: fx.Node, layers: list[LinearLayer], rank: int) -> int:
    """How many fewer numbers a step reads."""
    rows, width = rows_and_width(root)
    columns = sum(layer.sizes[1] for layer in layers)
    return width * columns - (rank + rows) * (columns + width)


def _root(node: fx.Node) -> fx.Node:
    """The vector of which `node` is a reshaped view."""
    while node.op == "call_function" and op_name(node.target) in _RELABELS:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if rows_and_width(source) != rows_and_width(node):
            break
        node = source
    return node


def rows_and_width(node: fx.Node) -> tuple[int, int]:
    """``(rows, width)`` of a tensor whose last dimension is its width."""
    value = tensor_of(node)
    width = value.shape[-1] if value is not None and value.dim() else 1
    return (value.numel() // width if value is not None else 0), width


def _batch(graph: fx.Graph, times: Mapping[fx.Node, BindingTime]) -> int:
    """The most rows that a conditioning vector has: images of a live input, or timesteps."""
    sizes = [1]
    for node in graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if value is None or not is_static(value):
            continue
        if times[node] is BindingTime.STEP:
            sizes.append(value.numel())
        elif times[node] is BindingTime.LIVE and value.dim():
            sizes.append(value.shape[0])
    return max(sizes)


def ancestors(nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """`nodes` and everything that they are computed from."""
    found: dict[fx.Node, None] = {}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += node.all_input_nodes
    return found
