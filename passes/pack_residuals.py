"""Give a body its residuals as views of one buffer each binding time and dtype, instead of one input each.

A DiT-XL/2 body reads some 30 residuals; copying each from its table would cost more launches than hoisting saved. In one
buffer they are one row copy. A residual keeps its memory layout, so the operators that read it take the same path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ._dependence import BindingTime
from ._graph import dense_order, tensor_of
from ._pass import PassReport

aten = torch.ops.aten

_ALIGNMENT = 64
"""Bytes; what a fresh allocation of the CPU allocator has, so that kernels choose the same path."""


@dataclass(frozen=True)
class Slice:
    """Where one residual lies in a row: entries ``offset`` to ``offset + numel``, dimensions stored in `order`."""

    name: str
    offset: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def write(self, row: Tensor, value: Tensor) -> None:
        """Copy `value` into its place in `row` ``[total]``."""
        row[self.offset : self.offset + self.numel].view([self.shape[d] for d in self.order]).copy_(
            value.permute(self.order)
        )


@dataclass(frozen=True)
class RowBuffer:
    """One input of a packed body: `name`, ``[total]`` entries of `dtype` on `device`, filled from values of `time`."""

    name: str
    time: BindingTime
    dtype: torch.dtype
    device: torch.device
    total: int
    slices: tuple[Slice, ...]


def pack_residuals(
    graph_module: fx.GraphModule, residuals: Mapping[str, BindingTime]
) -> tuple[tuple[RowBuffer, ...], PassReport]:
    """Replace the placeholders `residuals` of `graph_module` by slices of new placeholders, in place."""
    graph = graph_module.graph
    before = len(graph.find_nodes(op="call_function"))
    groups: dict[tuple[BindingTime, torch.dtype, torch.device], list[fx.Node]] = {}
    for node in graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if node.name in residuals and value is not None:
            groups.setdefault((residuals[node.name], value.dtype, value.device), []).append(node)
    buffers = []
    for (time, dtype, device), nodes in groups.items():
        name = f"{time.name.lower()}_row_{str(dtype).removeprefix('torch.')}"
        slices, total = _lay_out(nodes, dtype)
        _rewrite(graph, name, nodes, slices, total)
        buffers.append(RowBuffer(name, time, dtype, device, total, slices))
    graph.lint()
    graph_module.recompile()
    changed = sum(map(len, groups.values()))
    after = len(graph.find_nodes(op="call_function"))
    return tuple(buffers), PassReport("pack_residuals", True, changed, before, after)


def _lay_out(nodes: list[fx.Node], dtype: torch.dtype) -> tuple[tuple[Slice, ...], int]:
    step = max(1, _ALIGNMENT // dtype.itemsize)
    slices, offset = [], 0
    for node in nodes:
        value = tensor_of(node)
        assert value is not None
        order = dense_order(value) or tuple(range(value.dim()))
        slices.append(Slice(node.name, offset, tuple(value.shape), order))
        offset += -(-value.numel() // step) * step
    return tuple(slices), offset


def _rewrite(graph: fx.Graph, name: str, nodes: list[fx.Node], slices: tuple[Slice, ...], total: int) -> None:
    first = next(iter(graph.nodes))
    with graph.inserting_before(first):
        buffer = graph.placeholder(name)
    fake = tensor_of(nodes[0])
    assert fake is not None
    buffer.meta["val"] = fake.new_empty(total)
    at = next(n for n in graph.nodes if n.op != "placeholder")
    for node, part in zip(nodes, slices, strict=True):
        stored = [part.shape[d] for d in part.order]
        inverse = sorted(range(len(part.order)), key=part.order.__getitem__)
        with graph.inserting_before(at):
            value = _call(graph, aten.slice.Tensor, buffer, 0, part.offset, part.offset + part.numel)
            value = _call(graph, aten.view.default, value, stored)
            if inverse != sorted(inverse):
                value = _call(graph, aten.permute.default, value, inverse)
        node.replace_all_uses_with(value)
        graph.erase_node(node)


def _call(graph: fx.Graph, target: torch._ops.OpOverload, source: fx.Node, *args: object) -> fx.Node:
    node = graph.call_function(target, (source, *args))  # type: ignore[arg-type]
    node.meta["val"] = target(source.meta["val"], *args)
    return node
