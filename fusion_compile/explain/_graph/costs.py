"""The cost of one node of an ATen graph: floating-point operations, bytes moved, kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fusion_compile.passes._cost import flops as rough_flops
from fusion_compile.passes._cost import launches as _counts
from fusion_compile.passes._graph import is_view, op_name, value_of


def flops(node: fx.Node) -> int:
    """Count floating-point operations by the formulas of ``torch.utils.flop_counter``.

    Matrix products, convolutions and attention count, a multiply-add as two; the rest is free. Deviations: attention on
    a CPU counts too, where torch counts nothing, and so do composite operators (linear, matmul) of a graph that keeps
    them.
    """
    if node.op != "call_function":
        return 0
    formula = _FORMULAS.get(op_name(node.target)) or _registered(node.target)
    if formula is None:
        return rough_flops(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return number(formula(*args, **kwargs, out_val=value_of(node)))


def bytes_moved(node: fx.Node) -> tuple[int, int]:
    """Return the bytes that a kernel for this node alone reads and writes; 0 for views, inputs and unpackings.

    A lookup (embedding, gather, index) reads as many bytes of its table as it writes.
    """
    if not launches(node):
        return 0, 0
    name = op_name(node.target)
    written = mutated(node)
    given = [] if written else list(tensors_of(node))
    out = sum(map(touched, [*given, *(t for n in written for t in tensors_of(n))]))
    read = 0
    for i, source in enumerate(node.all_input_nodes):
        if source in written and name in _OVERWRITES:
            continue
        size = sum(map(touched, tensors_of(source)))
        read += min(size, out) if name in _LOOKUPS and i == 0 else size
    return read, out


def mutated(node: fx.Node) -> list[fx.Node]:
    """Return the nodes whose memory `node` writes, by its operator's schema."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [n for n in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(n, fx.Node)]
    return found


def tensors_of(node: fx.Node) -> Iterator[Tensor]:
    """Return the fake tensors of the result of `node`."""
    value = value_of(node)
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, Tensor):
            yield item


def touched(tensor: Tensor) -> int:
    """Return the bytes behind `tensor`. Elements that an expanded dimension repeats count once."""
    sizes = [number(n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0]
    return math.prod(sizes) * tensor.element_size()


def number(size: Any) -> int:
    """Return a size as an int. A symbol counts as the size that it was traced with, or 0 if it depends on data."""
    if isinstance(size, (int, float)):
        return int(size)
    hint = getattr(getattr(size, "node", None), "hint", None)
    return int(hint) if isinstance(hint, (int, float)) else 0


def _registered(target: Any) -> Callable[..., Any] | None:
    packet = getattr(target, "overloadpacket", target)
    found: Callable[..., Any] | None = flop_registry.get(packet)
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    count = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return int(count)


_FORMULAS: dict[str, Callable[..., int]] = {
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_fused_attention_overrideable": _attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": _attention_backward,
}
_LOOKUPS = {"embedding", "index", "index_select", "gather", "select_scatter", "take"}
_OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_", "random_"}
_ALIASES = {"_unsafe_view", "alias", "lift_fresh", "detach_"}
_ALLOCATIONS = ("empty", "new_empty")


def is_alias(node: fx.Node) -> bool:
    """Whether the result of `node` is its first input's memory, so that no kernel runs."""
    return is_view(node) or (node.op == "call_function" and op_name(node.target) in _ALIASES)


def launches(node: fx.Node) -> int:
    """Count the kernels that `node` starts in eager mode: 1, or 0 for a view, input, unpacking or allocation."""
    return int(_counts(node) > 0 and not is_alias(node) and not op_name(node.target).startswith(_ALLOCATIONS))


def main_dtype(node: fx.Node) -> torch.dtype:
    """Return the dtype of the arithmetic of a matrix product: that of its first floating operand."""
    for source in node.all_input_nodes:
        for tensor in tensors_of(source):
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.dtype
    return torch.float32
