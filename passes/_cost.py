"""Rough costs of nodes, from shapes alone: good enough to decide what is worth moving, no claim about time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ._graph import is_view, op_name, tensor_of


@dataclass(frozen=True)
class Exchange:
    """Cost-model exchange rates, in bytes moved through memory: for one kernel launch, and FLOPs for one byte."""

    bytes_per_launch: int
    flops_per_byte: int


def exchange_rates(device: torch.device) -> Exchange:
    """Orders of magnitude for the cost model.

    A GPU moves megabytes in the time of a launch and does 100 to 300 FLOP for each byte. A CPU core moves some
    kilobytes in the time of a small operator and does about 8 FLOP for each byte.

    Args:
        device: Only its type counts: "cuda", or anything else.

    Returns:
        The `Exchange` of such a device.

    Example:
        >>> import torch
        >>> from fusion_compile.passes import exchange_rates
        >>> exchange_rates(torch.device("cpu")).flops_per_byte
        8
    """
    return Exchange(2 << 20, 150) if device.type == "cuda" else Exchange(16 << 10, 8)


def launches(node: fx.Node) -> int:
    """1 for a node that starts a kernel when run eagerly, 0 for a view, an input or an unpacking."""
    return int(node.op == "call_function" and not is_view(node) and op_name(node.target) != "getitem")


def count_launches(graph_module: fx.GraphModule) -> int:
    """Count the kernels that one eager run of a graph starts; views, inputs and unpackings start none.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.

    Returns:
        The number of launches.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import count_launches
        >>> count_launches(make_fx(lambda x: x.T.sin(), tracing_mode="fake")(torch.ones(2, 3)))
        1
    """
    return sum(map(launches, graph_module.graph.nodes))


def flops(node: fx.Node) -> int:
    """Multiply-adds of matrix products, convolutions and attention, times two; 0 for everything else."""
    out = tensor_of(node)
    shapes = [tuple(t.shape) for t in map(tensor_of, node.all_input_nodes) if t is not None]
    if node.op != "call_function" or out is None or len(shapes) < 2:
        return 0
    name = op_name(node.target)
    if name == "linear":
        return 2 * out.numel() * shapes[1][-1]
    if name in ("mm", "bmm", "matmul", "mv", "dot"):
        return 2 * out.numel() * shapes[0][-1]
    if name in ("addmm", "baddbmm") and len(shapes) > 2:
        return 2 * out.numel() * shapes[1][-1]
    if name in ("convolution", "conv1d", "conv2d", "conv3d"):
        return 2 * out.numel() * math.prod(shapes[1][1:])
    if name.startswith(("scaled_dot_product", "_scaled_dot_product")):
        return 4 * out.numel() * shapes[1][-2]
    return 0
