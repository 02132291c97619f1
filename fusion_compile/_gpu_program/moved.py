"""A graph that was captured on a CPU, as it would have been captured on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx

from fusion_compile._compat import hand_on_static_inputs
from fusion_compile._gpu_program.autocast import cast_as_on_gpu
from fusion_compile.passes import find_host_syncs, lower_to_aten
from fusion_compile.passes._user_frame import user_line

_STAYS = "stays_on_the_cpu"
"""A mark in ``meta["custom"]``, which lasts from Dynamo's graph to ATen's."""
_CARRIED = ("tensor_dict", "_dynamo_source", "dynamo_source")
"""What Dynamo notes at an input; by it Inductor knows which inputs keep their address."""


def in_aten(captured: fx.GraphModule, *, attention: bool = True, gradients: bool = True) -> fx.GraphModule:
    """A graph that Dynamo captured on a CPU in ATen operators, its backward written out, with a GPU's `attention`.
    `gradients`: whether they are enabled where the graph begins.

    The backward is traced on the CPU's fake tensors: autograd asks C++ for a GPU before it runs on one.
    """
    aten = lower_to_aten(as_on_gpu(captured, attention=attention), gradients=gradients)
    for node, original in zip(_inputs(aten), _inputs(captured), strict=True):
        node.meta |= {key: original.meta[key] for key in _CARRIED if key in original.meta}
    hand_on_static_inputs(aten)
    return aten


def as_on_gpu(captured: fx.GraphModule, *, attention: bool = True) -> fx.GraphModule:
    """A copy of a graph that Dynamo captured on a CPU, with a GPU's `attention`, still on the CPU.

    Autocast stays the CPU's, because only there it acts on the CPU's fake tensors; what only a GPU's computes in fp32
    is cast.
    """
    graph = fx.GraphModule(captured, copy.deepcopy(captured.graph))
    cast_as_on_gpu(graph.graph, enabled=torch.is_autocast_enabled("cpu"))
    for node in graph.graph.nodes:
        if attention and node.target in _ATTENTIONS:
            node.target = _ATTENTIONS[node.target]
        if _is_factory_without_device(node):
            node.meta["custom"] = {**(node.meta.get("custom") or {}), _STAYS: True}
    graph.recompile()
    return graph


def moved_to_gpu(graph: fx.GraphModule, fake: Any) -> list[Tensor]:
    """Put the inputs and factories of an ATen graph on the GPU, in place; return fake inputs there.

    A factory that was given no device stays where it is, on the CPU, as it would on a machine with a GPU.
    """
    gpu = torch.device("cuda", 0)
    inputs: list[Tensor] = []

    def moved(a: Any) -> Any:
        return gpu if isinstance(a, torch.device) and a.type == "cpu" else a

    for node in graph.graph.nodes:
        if node.op == "placeholder":
            example = node.meta.get("example_value", node.meta.get("val"))
            with fake:
                new = torch.empty_strided(example.shape, example.stride(), dtype=example.dtype, device=gpu)
            inputs.append(new.requires_grad_(example.requires_grad))
            node.meta["val" if "val" in node.meta else "example_value"] = new
        if not (node.meta.get("custom") or {}).get(_STAYS):
            node.args, node.kwargs = (fx.node.map_aggregate(a, moved) for a in (node.args, node.kwargs))
    graph.recompile()
    return inputs


def why_not_on_gpu(graph: fx.GraphModule) -> str:
    """What in an ATen graph no GPU's program can hold, in a sentence; "" where nothing is known."""
    for finding in find_host_syncs(graph):
        return str(finding)
    for node in graph.graph.nodes:
        made = node.meta.get("val")
        if (node.meta.get("custom") or {}).get(_STAYS) and isinstance(made, Tensor) and made.ndim:
            where = user_line(node) or "the program"
            return (
                f"{where}: {node.target} makes a tensor {list(made.shape)} on the CPU, because it is given no device; "
                f"give it that of its neighbours (device=x.device)."
            )
    return ""


def _is_factory_without_device(node: fx.Node) -> bool:
    """Whether `node` makes a tensor of nothing and leaves open where: that is the CPU, also on a machine with a GPU."""
    made = node.meta.get("example_value")
    return (
        node.op == "call_function"
        and isinstance(made, Tensor)
        and not any(isinstance(source.meta.get("example_value"), Tensor) for source in node.all_input_nodes)
        and node.kwargs.get("device") is None
    )


def _inputs(graph: fx.GraphModule) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="placeholder"))


def attention_on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's first choices on an H100 without cuDNN's: flash for half precision without a mask, else the
    memory-efficient kernel. Which one is decided in C++, by kernels that a CPU build does not have."""
    pad = torch.nn.functional.pad
    if enable_gqa:
        times = q.shape[-3] // k.shape[-3]
        k, v = k.repeat_interleave(times, -3), v.repeat_interleave(times, -3)
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None:
        width = q.shape[-1]
        if width % 8:
            scale = scale or width**-0.5
            q, k, v = (pad(t, (0, -width % 8)) for t in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
        return out[..., :width]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(q.dtype)
        keys = k.shape[2]
        attn_mask = attn_mask.expand(q.shape[0], q.shape[1], q.shape[2], keys)
        if keys % 8:
            attn_mask = pad(attn_mask, (0, -keys % 8))[..., :keys]
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(q, k, v, attn_mask, needs, dropout_p, is_causal, scale=scale)[0]
    return out


def _of_an_exported_graph(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_on_gpu` with the signature of the CPU's kernel, whose second result only a backward reads."""
    return attention_on_gpu(q, k, v, attn_mask, dropout_p, is_causal, scale), q.new_empty(0)


_ATTENTIONS = {
    torch.nn.functional.scaled_dot_product_attention: attention_on_gpu,
    torch.ops.aten.scaled_dot_product_attention.default: attention_on_gpu,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _of_an_exported_graph,
}
