"""A captured graph in ATen operators keeps its numbers and its marks, and has a GPU's attention in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fusion_compile import _compat
from fusion_compile._gpu_program.moved import attention_on_gpu, in_aten, why_not_on_gpu


def captured(fn: object, *inputs: Tensor) -> fx.GraphModule:
    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, given: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compile(fn, backend=keep, fullgraph=True)(*inputs)  # type: ignore[call-overload]
    return graphs[0]


def test_marks_of_static_inputs_and_numbers_stay() -> None:
    weight, x = torch.ones(3), torch.arange(3.0)
    _compat.mark_static(weight)
    graph = captured(lambda w, x: w.mul_(x).sin(), weight, x)
    aten = in_aten(graph)
    notes = [node.meta.get("tensor_dict", {}) for node in aten.graph.find_nodes(op="placeholder")]
    assert ["_dynamo_static_input_type" in note for note in notes] == [True, False]
    assert torch.equal(aten(torch.ones(3), x)[0], x.sin())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_the_gpus_attention_has_torchs_shapes(dtype: torch.dtype, options: dict[str, object]) -> None:
    """Its numbers are the GPU's own; there is no kernel to compute them with here."""
    options = dict(options)
    heads = 2 if options.get("enable_gqa") else 4
    q = torch.empty(2, 4, 6, 12, device="meta", dtype=dtype, requires_grad=True)
    k, v = (torch.empty(2, heads, 10, 12, device="meta", dtype=dtype, requires_grad=True) for _ in range(2))
    if options.pop("mask", False):
        options["attn_mask"] = torch.empty(6, 10, device="meta", dtype=torch.bool)
    out = attention_on_gpu(q, k, v, **options)  # type: ignore[arg-type]
    wanted = F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    assert out.shape == wanted.shape and out.dtype == wanted.dtype
    assert [g.shape for g in torch.autograd.grad(out.sum(), (q, k, v))] == [q.shape, k.shape, v.shape]


def test_the_attention_of_a_captured_graph_is_the_gpus() -> None:
    def loss(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q).sum()

    aten = in_aten(captured(loss, torch.ones(1, 2, 8, 16)))
    targets = [str(n.target) for n in aten.graph.nodes if "attention" in str(n.target)]
    assert targets == ["aten._scaled_dot_product_efficient_attention.default"]


def test_a_factory_without_a_device_is_named_by_its_line() -> None:
    x = torch.ones(4)
    assert why_not_on_gpu(in_aten(captured(lambda x: x + torch.rand(4, device=x.device), x))) == ""
    said = why_not_on_gpu(in_aten(captured(lambda x: x + torch.rand(4), x)))
    assert "test_moved.py:" in said and "aten.rand.default makes a tensor [4] on the CPU" in said
