"""Let regions write what they compute straight into the concatenation that it is a part of.

    a = invoke_subgraph(region_0, x, w)[0]            bank = empty([8]); p, q = split_with_sizes(bank, [4, 4])
    b = invoke_subgraph(region_0, y, w)[0]      ->    invoke_subgraph(region_0, x, w, p)
    bank = cat([view(a), view(b)])                    invoke_subgraph(region_0, y, w, q)

The gradients of a training step are joined in banks. Apart from the regions that compute them, each join is another
pass over all gradients, and each gradient exists twice while it runs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._compat import invoke_subgraph
from ._graph import calls, is_view, op_name, tensor_of
from ._pass import PassReport
from ._region import metadata, written

aten = torch.ops.aten
_KEEPS_VALUES = (aten.clone.default, aten._to_copy.default)


@dataclass(frozen=True)
class _Part:
    """Entry `at` of `join`, computed by `call` as output `output` and given on by `chain`, views mostly."""

    join: fx.Node
    at: int
    call: fx.Node
    output: int
    chain: tuple[fx.Node, ...]

    @property
    def kind(self) -> Any:
        """Equal for parts that a region may write in the same way."""
        steps = tuple(
            (written(n, lambda _: ""), metadata(n.meta["val"])) for n in self.chain if n.target is not operator.getitem
        )
        return steps, metadata(tensor_of(self.chain[0])), _slot(self.join, self.at)


def write_into_joins(graph_module: fx.GraphModule, *, is_join: Callable[[fx.Node], bool]) -> PassReport:
    """Replace joins by memory that is written part by part, in place.

    Exact: each entry gets the number that it had. A region writes a part where all of its calls compute one in the same
    way, and nothing else reads it; other parts are copied where the join was. Apply it after the passes that make
    regions.

    Args:
        graph_module: An ATen graph with ``meta["val"]`` and calls of regions.
        is_join: Which ``cat`` and ``stack`` along the first axis are replaced. Nobody may write into their results.

    Returns:
        The report; `changed` counts the parts that regions write.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import outline_runs, write_into_joins
        >>> def gradients(x):
        ...     return torch.stack([x.sin() + 1, x])
        >>> def joins(node):
        ...     return "stack" in str(node.target)
        >>> graph_module = make_fx(gradients, tracing_mode="fake")(torch.ones(2))
        >>> _ = outline_runs(graph_module, may_hold=lambda node: not joins(node))
        >>> write_into_joins(graph_module, is_join=joins).changed
        1
    """
    graph = graph_module.graph
    before = len(calls(graph))
    joins = [node for node in calls(graph) if is_join(node) and _is_along_the_first_axis(node)]
    parts = [part for join in joins for at in range(len(_pieces(join))) if (part := _part(join, at)) is not None]
    by_region: dict[str, dict[int, list[_Part]]] = {}
    for part in parts:
        by_region.setdefault(str(part.call.args[1]), {}).setdefault(part.output, []).append(part)
    many = {name: [n for n in calls(graph) if n.target is invoke_subgraph and n.args[1] == name] for name in by_region}
    bound: dict[str, dict[int, list[_Part]]] = {}
    for name, outputs in by_region.items():
        for output, found in outputs.items():
            if len(found) == len(many[name]) and len({part.kind for part in found}) == 1:
                bound.setdefault(name, {})[output] = found
    done = {(part.join, part.at): part for outputs in bound.values() for found in outputs.values() for part in found}
    slots = {
        join: _allocate(graph, join, [part.call for (at, _), part in done.items() if at is join]) for join in joins
    }
    for name, outputs in bound.items():
        region = graph_module.get_submodule(name)
        assert isinstance(region, fx.GraphModule)
        _write_inside(region, {output: found[0] for output, found in outputs.items()})
        for call in many[name]:
            own = {output: next(p for p in found if p.call is call) for output, found in outputs.items()}
            _call_with(graph, call, own, slots)
    for join in joins:
        for at, piece in enumerate(_pieces(join)):
            if (join, at) not in done:
                with graph.inserting_before(join):
                    graph.call_function(aten.copy_.default, (slots[join][at], piece)).meta["val"] = piece.meta["val"]
        join.replace_all_uses_with(slots[join][-1])
        graph.erase_node(join)
    for part in done.values():
        for node in reversed(part.chain):
            if not node.users:
                graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return PassReport("write_into_joins", True, len(done), before, len(calls(graph)))


def _pieces(join: fx.Node) -> list[fx.Node]:
    return list(join.args[0])  # type: ignore[arg-type]


def _is_along_the_first_axis(join: fx.Node) -> bool:
    axis = join.args[1] if len(join.args) > 1 else join.kwargs.get("dim", 0)
    own = tensor_of(join)
    joined = axis == 0 and op_name(join.target) in ("cat", "stack")
    return bool(joined and own is not None and own.is_contiguous())


def _part(join: fx.Node, at: int) -> _Part | None:
    """Part `at` of `join`, if it is a region's output that nothing else reads."""
    node = _pieces(join)[at]
    chain = [node]
    while (is_view(node) or node.target in _KEEPS_VALUES) and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
        chain.insert(0, node)
    read_once = all(len(n.users) == 1 for n in chain) and sum(p is chain[-1] for p in _pieces(join)) == 1
    if not read_once or node.target is not operator.getitem:
        return None
    call, output = node.args
    if not isinstance(call, fx.Node) or call.target is not invoke_subgraph or not isinstance(output, int):
        return None
    return _Part(join, at, call, output, tuple(chain))


def _slot(join: fx.Node, at: int) -> Any:
    """Shape and dtype of the memory of part `at`."""
    own, piece = join.meta["val"], _pieces(join)[at].meta["val"]
    return tuple(piece.shape), own.dtype


def _allocate(graph: fx.Graph, join: fx.Node, writers: list[fx.Node]) -> list[fx.Node]:
    """Memory for `join` in front of the first of `writers`: a view for each part, and the whole."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    own: Tensor = join.meta["val"]
    with graph.inserting_before(min([*writers, join], key=order.__getitem__)):
        options: dict[str, Any] = {"dtype": own.dtype, "device": own.device, "pin_memory": False}
        whole = graph.call_function(aten.empty.memory_format, (list(own.shape),), options)
        if op_name(join.target) == "stack":
            split = graph.call_function(aten.unbind.int, (whole, 0))
        else:
            sizes = [int(piece.meta["val"].shape[0]) for piece in _pieces(join)]
            split = graph.call_function(aten.split_with_sizes.default, (whole, sizes, 0))
        views = [graph.call_function(operator.getitem, (split, at)) for at in range(len(_pieces(join)))]
    whole.meta.update(join.meta)
    split.meta["val"] = tuple(own.new_empty(_slot(join, at)[0]) for at in range(len(views)))
    for view, value in zip(views, split.meta["val"], strict=True):
        view.meta["val"] = value
    return [*views, whole]


def _write_inside(region: fx.GraphModule, parts: dict[int, _Part]) -> None:
    """Let `region` take a tensor more for each of its outputs `parts`, and write there instead of giving it back."""
    graph = region.graph
    last = graph.output_node()
    results = list(last.args[0])  # type: ignore[arg-type]
    inputs = graph.find_nodes(op="placeholder")
    at = inputs[-1] if inputs else None
    for output, part in sorted(parts.items()):
        with graph.inserting_before(next(iter(graph.nodes))) if at is None else graph.inserting_after(at):
            at = graph.placeholder(f"part_{output}")
        shape, dtype = _slot(part.join, part.at)
        at.meta["val"] = part.join.meta["val"].new_empty(shape, dtype=dtype)
        values: dict[fx.Node, fx.Node] = {part.chain[0]: results[output]}
        with graph.inserting_before(last):
            for node in part.chain[1:]:
                values[node] = graph.node_copy(node, values.__getitem__)
            write = graph.call_function(aten.copy_.default, (at, values[part.chain[-1]]))
        write.meta.update({**part.chain[-1].meta, "val": at.meta["val"]})
    last.args = (tuple(value for output, value in enumerate(results) if output not in parts),)
    graph.lint()
    region.recompile()


def _call_with(graph: fx.Graph, call: fx.Node, parts: dict[int, _Part], slots: dict[fx.Node, list[fx.Node]]) -> None:
    """Hand the places of `parts` to one call of their region, and count its other outputs anew."""
    call.args = (*call.args, *(slots[part.join][part.at] for _, part in sorted(parts.items())))
    for user in list(call.users):
        output = user.args[1]
        assert isinstance(output, int)
        if output not in parts:
            user.args = (call, output - sum(other < output for other in parts))
    values = call.meta.get("val")
    if values is not None:
        call.meta["val"] = tuple(value for output, value in enumerate(values) if output not in parts)
