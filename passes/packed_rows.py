"""Lay out a body's residuals in one buffer for each binding time and dtype, so that one copy brings a whole row.

    before   shift, scale = table_1[i], table_2[i]          a copy for each of some 170 residuals
    after    row = table[i]; shift, scale = row[:64], row[64:128]     one copy, and parts of it

A DiT-XL/2 body reads some 170 residuals; copying each from its table would cost more launches than hoisting saved. A
residual keeps its memory layout, so the operators that read it take the same path. The body is not rewritten: each
residual is a tensor of its own over its part of the buffer. Sliced inside the graph, the residuals of two blocks would
differ by their offsets, and the trace of one block would not serve the next.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._compat import OpOverload
from ._dependence import BindingTime
from ._graph import calls, dense_order, tensor_of
from ._pass import PassReport

aten = torch.ops.aten

_ALIGNMENT = 64
"""Bytes: the alignment of the CPU allocator, so that kernels choose the same path."""


@dataclass(frozen=True)
class Slice:
    """The place of one residual in a row: entries ``offset`` to ``offset + numel``, dimensions stored in `order`."""

    name: str
    offset: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class RowBuffer:
    """A row: ``[total]`` entries of `dtype` on `device`, filled from values of `time`.

    `name`: of the output of a packed stage that gives it.
    """

    name: str
    time: BindingTime
    dtype: torch.dtype
    device: torch.device
    total: int
    slices: tuple[Slice, ...]

    def views(self, row: Tensor) -> dict[str, Tensor]:
        """Take a row apart.

        A residual is the row's memory under a storage of its own, which keeps that memory alive. Writing the row
        changes no version of them.

        Args:
            row: ``[total]``.

        Returns:
            Each residual by name, in its shape and layout.
        """
        raw = row.view(torch.uint8)  # DLPack does not know every dtype
        size, found = self.dtype.itemsize, {}
        for part in self.slices:
            piece = raw[part.offset * size : (part.offset + part.numel) * size]
            value = torch.from_dlpack(piece).view(self.dtype)  # type: ignore[attr-defined]
            inverse = sorted(range(len(part.order)), key=part.order.__getitem__)
            found[part.name] = value.view([part.shape[d] for d in part.order]).permute(inverse)
        return found


def lay_out_residuals(graph_module: fx.GraphModule, residuals: Mapping[str, BindingTime]) -> tuple[RowBuffer, ...]:
    """Lay out the inputs of a body that are residuals; parts begin at multiples of 64 bytes.

    Args:
        graph_module: The body, with ``meta["val"]``.
        residuals: Name of an input -> its binding time.

    Returns:
        A buffer for each binding time, dtype and device.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import BindingTime, lay_out_residuals
        >>> body = make_fx(lambda a, b: a + b, tracing_mode="fake")(torch.ones(3), torch.ones(3))
        >>> (row,) = lay_out_residuals(body, {"a_1": BindingTime.STEP, "b_1": BindingTime.STEP})
        >>> row.name, row.total, [part.offset for part in row.slices]
        ('step_row_float32', 32, [0, 16])
    """
    groups: dict[tuple[BindingTime, torch.dtype, torch.device], list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = tensor_of(node)
        if node.name in residuals and value is not None:
            groups.setdefault((residuals[node.name], value.dtype, value.device), []).append(node)
    buffers = []
    for (time, dtype, device), nodes in groups.items():
        slices, total = _lay_out(nodes, dtype)
        name = f"{time.name.lower()}_row_{str(dtype).removeprefix('torch.')}"
        buffers.append(RowBuffer(name, time, dtype, device, total, slices))
    return tuple(buffers)


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


def pack_outputs(
    graph_module: fx.GraphModule, outputs: Sequence[str], buffers: Sequence[RowBuffer], keep: Sequence[str] = ()
) -> tuple[fx.GraphModule, PassReport]:
    """Make a stage return whole rows: ``(*one row [total] for each buffer, *the outputs in keep)``.

    Exact. One concatenation makes a row, as copying the slices one by one would be hundreds of launches at each step.

    Args:
        graph_module: A stage; it stays as it is.
        outputs: Names of its outputs. Every slice of `buffers` and all of `keep` are among them.
        buffers: The rows.
        keep: Outputs that other stages read.

    Returns:
        The new stage, and the report.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import BindingTime, lay_out_residuals, pack_outputs
        >>> stage = make_fx(lambda t: (t.sin(), t.cos()), tracing_mode="fake")(torch.zeros(2))
        >>> body = make_fx(lambda sin, cos: sin + cos, tracing_mode="fake")(torch.ones(2), torch.ones(2))
        >>> rows = lay_out_residuals(body, {"sin_1": BindingTime.STEP, "cos_1": BindingTime.STEP})
        >>> packed, _ = pack_outputs(stage, ("sin_1", "cos_1"), rows)
        >>> packed(torch.zeros(2))[0][[0, 1, 16, 17]]
        tensor([0., 0., 1., 1.])
    """
    graph = copy.deepcopy(graph_module.graph)
    before = len(calls(graph))
    output = next(iter(graph.find_nodes(op="output")))
    values = dict(zip(outputs, output.args[0], strict=True))
    rows = [
        _concatenate(graph, output, b, [_flat(graph, values[p.name], p, output) for p in b.slices]) for b in buffers
    ]
    output.args = ((*rows, *(values[name] for name in keep)),)
    graph.lint()
    report = PassReport("pack_outputs", True, len(rows), before, len(calls(graph)))
    return fx.GraphModule(graph_module, graph), report


def _flat(graph: fx.Graph, value: fx.Node, part: Slice, output: fx.Node) -> fx.Node:
    """The entries of `value` as they lie in a row, ``[numel]``, made right behind it in the block that computes it."""
    last = value

    def then(target: OpOverload, *args: Any, **kwargs: Any) -> fx.Node:
        nonlocal last
        where = graph.inserting_before(output) if last.op == "placeholder" else graph.inserting_after(last)
        with where:
            last = _call(graph, target, last, *args, **kwargs)
        return last

    if part.order != tuple(range(len(part.order))):
        then(aten.permute.default, list(part.order))
    if not last.meta["val"].is_contiguous():  # reshape would copy too, but outside of the kernel that computes it
        then(aten.clone.default, memory_format=torch.contiguous_format)
    return then(aten.reshape.default, [part.numel])


def _concatenate(graph: fx.Graph, output: fx.Node, buffer: RowBuffer, values: list[fx.Node]) -> fx.Node:
    pieces: list[fx.Node] = []
    ends = [part.offset for part in buffer.slices[1:]] + [buffer.total]
    with graph.inserting_before(output):
        for part, value, end in zip(buffer.slices, values, ends, strict=True):
            pieces.append(value)
            if padding := end - part.offset - part.numel:
                metadata: dict[str, Any] = {"dtype": buffer.dtype, "device": buffer.device}
                zeros = graph.call_function(aten.full.default, ([padding], 0), metadata)
                zeros.meta["val"] = value.meta["val"].new_zeros(padding)
                pieces.append(zeros)
        row = graph.call_function(aten.cat.default, (pieces,))
    row.meta["val"] = pieces[0].meta["val"].new_empty(buffer.total)
    return row


def _call(graph: fx.Graph, target: OpOverload, source: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, (source, *args), kwargs)
    node.meta["val"] = target(source.meta["val"], *args, **kwargs)
    return node
