"""Give a body its residuals as views of one buffer each binding time and dtype, instead of one input each.

A DiT-XL/2 body reads some 30 residuals; copying each from its table would cost more launches than hoisting saved. In
one buffer they are one row copy. A residual keeps its memory layout, so the operators that read it take the same path.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ._compat import OpOverload
from ._dependence import BindingTime
from ._graph import calls, dense_order, tensor_of
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
    before = len(calls(graph))
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
    return tuple(buffers), PassReport("pack_residuals", True, changed, before, len(calls(graph)))


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


def pack_outputs(
    graph_module: fx.GraphModule, outputs: Sequence[str], buffers: Sequence[RowBuffer], keep: Sequence[str] = ()
) -> tuple[fx.GraphModule, PassReport]:
    """Make a stage give whole rows: ``(*one row [total] each buffer, *the outputs named in keep)``, in a new module.

    `outputs` are the names of what `graph_module` returns; every slice of `buffers` and all of `keep` are among them.
    One concatenation a row: copying the slices one by one would be hundreds of launches a step.
    """
    graph = copy.deepcopy(graph_module.graph)
    before = len(calls(graph))
    output = next(iter(graph.find_nodes(op="output")))
    values = dict(zip(outputs, output.args[0], strict=True))
    with graph.inserting_before(output):
        rows = [_concatenate(graph, buffer, [values[part.name] for part in buffer.slices]) for buffer in buffers]
    output.args = ((*rows, *(values[name] for name in keep)),)
    graph.lint()
    report = PassReport("pack_outputs", True, len(rows), before, len(calls(graph)))
    return fx.GraphModule(graph_module, graph), report


def _concatenate(graph: fx.Graph, buffer: RowBuffer, values: list[fx.Node]) -> fx.Node:
    pieces: list[fx.Node] = []
    ends = [part.offset for part in buffer.slices[1:]] + [buffer.total]
    for part, value, end in zip(buffer.slices, values, ends, strict=True):
        if part.order != tuple(range(len(part.order))):
            value = _call(graph, aten.permute.default, value, list(part.order))
        pieces.append(_call(graph, aten.reshape.default, value, [part.numel]))
        if padding := end - part.offset - part.numel:
            metadata: dict[str, Any] = {"dtype": buffer.dtype, "device": buffer.device}
            zeros = graph.call_function(aten.full.default, ([padding], 0), metadata)
            zeros.meta["val"] = value.meta["val"].new_zeros(padding)
            pieces.append(zeros)
    row = graph.call_function(aten.cat.default, (pieces,))
    row.meta["val"] = pieces[0].meta["val"].new_empty(buffer.total)
    return row


def _call(graph: fx.Graph, target: OpOverload, source: fx.Node, *args: Any) -> fx.Node:
    node = graph.call_function(target, (source, *args))
    node.meta["val"] = target(source.meta["val"], *args)
    return node
