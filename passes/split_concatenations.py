"""Read the operands of a concatenation where only a part of it is read, so that each part keeps its own dependencies.

    both = cat([text, image], 1) + position        text1 = text + position[:, :77]
    text1, image1 = both[:, :77], both[:, 77:]  ->  image1 = image + position[:, 77:]

A model that joins text and image, adds a position to both and takes them apart again makes the text look as late as the
image. Sizes are known in an exported graph, so the parts need not meet. The reverse, a concatenation of all slices of
one tensor in their order, becomes that tensor.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from ._graph import calls, is_static, tensor_of
from ._pass import Declined, PassReport

aten = torch.ops.aten

_ELEMENTWISE = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.clone.default,
    aten._to_copy.default,
)
"""Rounded once for each element, so every kernel gives the same bits. A sine's vector and scalar code may differ."""

_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


@dataclass(frozen=True)
class _Part:
    """`node` is entries `start` to `end` of dimension `dim` of `source`."""

    node: fx.Node
    source: fx.Node
    dim: int
    start: int
    end: int


def split_concatenations(graph_module: fx.GraphModule) -> PassReport:
    """Rewrite parts of concatenations as parts of their operands, in place.

    Exact: the same numbers, but a view into the whole becomes a tensor with strides of its own. A part is followed
    through operators that round each element by itself, where nothing else reads their results and no two parts
    overlap, so that nothing is computed twice. Parts that cut an operand and reach into the next are declined.

    Args:
        graph_module: A functional ATen graph with ``meta["val"]`` and static sizes.

    Returns:
        The report; `changed` counts rewritten parts.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import format_graph, split_concatenations
        >>> def apart(a, b):
        ...     return torch.cat([a, b])[:2].sin()
        >>> graph_module = make_fx(apart, tracing_mode="fake")(torch.ones(2), torch.ones(3))
        >>> split_concatenations(graph_module).changed
        1
        >>> print(format_graph(graph_module.graph))
        a_1: float32[2] = input
        sin: float32[2] = aten.sin.default(a_1)
        return sin
    """
    graph = graph_module.graph
    before = len(calls(graph))
    changed = 0
    declined: dict[str, str] = {}
    again = True
    while again:
        again = False
        for rewrite in (_rejoin, _separate, _sink):  # a tensor that is whole again need not be split
            for node in calls(graph):
                count = rewrite(node, declined) if node.users else 0  # an erased node has no users
                changed += count
                again |= count > 0
    names = {node.name for node in graph.nodes}
    graph_module.recompile()
    kept = tuple(Declined(name, reason) for name, reason in declined.items() if name in names)
    return PassReport("split_concatenations", True, changed, before, len(calls(graph)), declined=kept)


def _rejoin(node: fx.Node, declined: dict[str, str]) -> int:
    """Replace a concatenation of all parts of one tensor, in order, by that tensor."""
    operands, dim = _concatenation(node)
    parts = [part for part in map(_part, operands) if part is not None and part.dim == dim]
    if not parts or len(parts) < len(operands) or len({part.source for part in parts}) > 1:
        return 0
    source = parts[0].source
    bounds = [0, *(part.end for part in parts)]
    if any(part.start != bound for part, bound in zip(parts, bounds, strict=False)) or bounds[-1] != _size(source, dim):
        return 0
    node.replace_all_uses_with(source)
    _erase_unread([node, *operands])
    return 1


def _separate(node: fx.Node, declined: dict[str, str]) -> int:
    """Replace each part of the concatenation `node` by an operand, a part of one, or a concatenation of several."""
    operands, dim = _concatenation(node)
    parts = [part for part in _parts_of(node) if part.dim == dim]
    if not operands or not parts:
        return 0
    is_dying = len(parts) == len(_readers(node))
    placed: list[_Part] = []
    for operand in operands:
        start = placed[-1].end if placed else 0
        placed.append(_Part(operand, node, dim, start, start + _size(operand, dim)))
    count = 0
    for part in parts:
        met = [p for p in placed if p.start < part.end and p.end > part.start]
        if len(met) > 1 and (met[0].start < part.start or met[-1].end > part.end):
            declined[part.node.name] = f"its entries of {node.name} cut an operand and reach into the next."
            continue
        if not met or len(met) == len(operands) > 1 or (len(met) > 1 and not is_dying):
            continue
        with node.graph.inserting_before(part.node):
            if len(met) == 1:
                replacement = _slice(met[0].node, dim, part.start - met[0].start, part.end - met[0].start)
            else:
                replacement = _call(node.graph, aten.cat.default, ([p.node for p in met], dim))
        part.node.replace_all_uses_with(replacement)
        count += 1
    _erase_unread([*(part.node for part in parts), node])
    return count


def _sink(node: fx.Node, declined: dict[str, str]) -> int:
    """Apply an elementwise operator, of which only parts are read, to parts of its operands."""
    if node.target not in _ELEMENTWISE or node.kwargs.get("alpha", 1) != 1:
        return 0
    parts = _parts_of(node)
    if not parts or len(parts) != len(_readers(node)) or len({part.dim for part in parts}) > 1 or _overlap(parts):
        return 0
    dim = parts[0].dim
    if not _comes_from_concatenation(node, dim):
        return 0
    from_end, size = dim - _tensor(node).dim(), _size(node, dim)

    def cut(source: fx.Node, part: _Part) -> fx.Node:
        at = from_end + _tensor(source).dim()
        return source if at < 0 or _size(source, at) != size else _slice(source, at, part.start, part.end)

    for part in parts:
        with node.graph.inserting_before(part.node):
            args = fx.node.map_arg(node.args, functools.partial(cut, part=part))
            replacement = _call(node.graph, node.target, args, dict(node.kwargs))
        part.node.replace_all_uses_with(replacement)
    _erase_unread([*(part.node for part in parts), node])
    return len(parts)


def _comes_from_concatenation(node: fx.Node, dim: int) -> bool:
    """Whether only elementwise operators lie between `node` and a concatenation along its dimension `dim`."""
    stack, seen = [node], set()
    while stack:
        at = stack.pop()
        value = tensor_of(at)
        if at in seen or value is None or value.dim() != _tensor(node).dim() or not is_static(value):
            continue
        seen.add(at)
        operands, along = _concatenation(at)
        if operands and along == dim:
            return True
        if at.target in _ELEMENTWISE:
            stack += at.all_input_nodes
    return False


def _concatenation(node: fx.Node) -> tuple[list[fx.Node], int]:
    """Operands and dimension of a concatenation of static sizes; otherwise no operands."""
    value = tensor_of(node)
    if node.target is not aten.cat.default or value is None or not is_static(value):
        return [], 0
    operands: list[fx.Node] = list(_argument(node, 0, "tensors", ()))
    for operand in map(_tensor, operands):
        if operand.dim() != value.dim() or operand.dtype != value.dtype:  # cat skips empty [0] and promotes
            return [], 0
    return operands, _argument(node, 1, "dim", 0) % value.dim()


def _readers(node: fx.Node) -> list[fx.Node]:
    """The readers of `node`; for a split, the readers are its items."""
    readers: list[fx.Node] = []
    for user in node.users:
        readers += user.users if user.target in _SPLITS else [user]
    return readers


def _parts_of(node: fx.Node) -> list[_Part]:
    return [part for part in map(_part, _readers(node)) if part is not None and part.source is node]


def _part(node: fx.Node) -> _Part | None:
    """`node` as consecutive entries of its source, or None if it is not."""
    whole = node.args[0] if node.target in (operator.getitem, aten.slice.Tensor) else None
    if not isinstance(whole, fx.Node):
        return None
    if node.target is operator.getitem and whole.target not in _SPLITS:
        return None
    source = whole.args[0] if node.target is operator.getitem else whole
    value = tensor_of(source) if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or value is None or not is_static(value):
        return None
    if node.target is aten.slice.Tensor:
        dim = _argument(node, 1, "dim", 0) % value.dim()
        first, last = _argument(node, 2, "start", None), _argument(node, 3, "end", None)
        if not all(bound is None or type(bound) is int for bound in (first, last)):
            return None  # it depends on data
        start, end, _ = slice(first, last).indices(value.shape[dim])
        if _argument(node, 4, "step", 1) != 1:
            return None
    else:
        dim = _argument(whole, 2, "dim", 0) % value.dim()
        sizes, at = _argument(whole, 1, "split_size", 1), _argument(node, 1, "", 0)
        if not all(type(size) is int for size in (sizes if isinstance(sizes, (list, tuple)) else (sizes,))):
            return None
        start = sum(sizes[:at]) if isinstance(sizes, (list, tuple)) else sizes * at
        end = start + _size(node, dim)
    return _Part(node, source, dim, start, max(start, end))


def _overlap(parts: list[_Part]) -> bool:
    ordered = sorted((part.start, part.end) for part in parts)
    return any(later[0] < earlier[1] for earlier, later in pairwise(ordered))


def _slice(node: fx.Node, dim: int, start: int, end: int) -> fx.Node:
    """Entries `start` to `end` of `node`, or `node` itself if that is all of them."""
    if (start, end) == (0, _size(node, dim)):
        return node
    return _call(node.graph, aten.slice.Tensor, (node, dim, start, end))


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    given, named = fx.node.map_arg((args, kwargs or {}), _tensor)
    node.meta["val"] = target(*given, **named)
    return node


def _erase_unread(nodes: list[fx.Node]) -> None:
    """Erase the nodes that nothing reads, and then the splits whose items they were."""
    for node in dict.fromkeys(nodes):
        if not node.users:
            sources = node.all_input_nodes
            node.graph.erase_node(node)
            _erase_unread([source for source in sources if source.target in _SPLITS])


def _tensor(node: fx.Node) -> Tensor:
    value = tensor_of(node)
    assert value is not None
    return value


def _size(node: fx.Node, dim: int) -> int:
    return _tensor(node).shape[dim]


def _argument(node: fx.Node, at: int, name: str, default: Any) -> Any:
    return node.args[at] if len(node.args) > at else node.kwargs.get(name, default)
