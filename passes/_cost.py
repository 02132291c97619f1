"""Rough costs of nodes, from shapes alone: good enough to decide what is worth moving, no claim about time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from ._graph import is_view, op_name, tensor_of


@dataclass(frozen=True)
class Exchange:
    """What is worth what, in bytes moved through memory: the time of one kernel launch, and of one FLOP."""

    bytes_per_launch: int
    flops_per_byte: int


def exchange_rates(device: torch.device) -> Exchange:
    """Orders of magnitude: a GPU moves megabytes in the time of a launch and does 100 to 300 FLOP a byte; a CPU core
    moves some kilobytes in the time of a small operator and does about 8 FLOP a byte."""
    return Exchange(2 << 20, 150) if device.type == "cuda" else Exchange(16 << 10, 8)


def launches(node: fx.Node) -> int:
    """1 for a node that starts a kernel when run eagerly, 0 for a view, an input or an unpacking."""
    return int(node.op == "call_function" and not is_view(node) and op_name(node.target) != "getitem")


def count_launches(graph_module: fx.GraphModule) -> int:
    """Kernels that one eager run of `graph_module` starts, views not counted."""
    return sum(map(launches, graph_module.graph.nodes))


def flops(node: fx.Node) -> int:
    """Multiply-adds of matrix products, convolutions and attention, times two; everything else is 0."""
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
