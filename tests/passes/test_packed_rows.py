"""Packed rows hold values of every layout and dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, RowBuffer, hoist_time_conditioning, lay_out_residuals, pack_outputs
from fusion_compile.passes.packed_rows import Slice

STEP, LIVE = BindingTime.STEP, BindingTime.LIVE


def test_a_packed_row_holds_every_layout_and_dtype() -> None:
    def fn(x: Tensor, t: Tensor) -> Tensor:
        return x @ t.sin().mT + t.half().cos().float().sum() + (t > 0).sum()

    graph_module = make_fx(fn, tracing_mode="fake")(torch.randn(2, 3), torch.randn(5, 3))
    hoisted = hoist_time_conditioning(graph_module, {"x_1": LIVE, "t_1": STEP}, n_steps=4)
    body = hoisted.body.graph_module
    buffers = lay_out_residuals(body, hoisted.residuals)
    stage = hoisted.stages[STEP]
    packed, _ = pack_outputs(stage.graph_module, stage.outputs, buffers)
    x, t = torch.randn(2, 3), torch.randn(5, 3)
    rows = packed(*([t] * len(stage.inputs)))
    inputs = {"x_1": x}
    for buffer, row in zip(buffers, rows, strict=True):
        inputs |= buffer.views(row)
    got = body(*(inputs[str(n.target)] for n in body.graph.find_nodes(op="placeholder")))
    assert set(inputs) == {"x_1", *hoisted.residuals} and torch.equal(got, graph_module(x, t))


def test_parts_begin_at_multiples_of_64_bytes() -> None:
    def body(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return a.sum() + b.sum() + c.sum()

    inputs = (torch.zeros(3), torch.zeros(17), torch.zeros(2, 2))
    graph_module = make_fx(body, tracing_mode="fake")(*inputs)
    (buffer,) = lay_out_residuals(graph_module, dict.fromkeys(("a_1", "b_1", "c_1"), STEP))
    assert [part.offset for part in buffer.slices] == [0, 16, 48] and buffer.total == 64
    assert buffer.name == "step_row_float32"


def test_views_share_the_memory_of_their_row() -> None:
    part = Slice("a", 1, (2, 2), (1, 0))
    buffer = RowBuffer("row", STEP, torch.float32, torch.device("cpu"), 6, (part,))
    row = torch.arange(6.0)
    view = buffer.views(row)["a"]
    assert view.tolist() == [[1, 3], [2, 4]]
    row[1] = 9
    assert view.tolist() == [[9, 3], [2, 4]]
