"""What one node of an ATen graph costs: floating-point operations, bytes through memory, kernels."""

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
    """As ``torch.utils.flop_counter`` counts them, by its own formulas: matrix products, convolutions, attention; a
    multiply-add is two and the rest is free. Attention on a CPU, which torch counts as nothing, is counted too, and so
    are the composite operators (linear, matmul) of a graph that keeps them."""
    if node.op != "call_function":
        return 0
    formula = _FORMULAS.get(op_name(node.target)) or _registered(node.target)
    if formula is None:
        return rough_flops(node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return number(formula(*args, **kwargs, out_val=value_of(node)))


def bytes_moved(node: fx.Node) -> tuple[int, int]:
    """Bytes that a kernel for this node alone reads and writes; nothing for views, inputs and unpackings.

    An operator that looks its input up (embedding, gather, index) reads as much of it as it gives out.
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
    """The nodes whose memory `node` writes, by its operator's schema."""
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
    """The fake tensors that `node` gives, one or many."""
    value = value_of(node)
    for item in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(item, Tensor):
            yield item


def touched(tensor: Tensor) -> int:
    """Bytes behind `tensor`: what an expanded dimension repeats counts once."""
    sizes = [number(n) for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0 or n == 0]
    return math.prod(sizes) * tensor.element_size()


def number(size: Any) -> int:
    """A size as an int: of a symbol, the size that it was traced with, or 0 when it depends on data."""
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
    """Whether `node` gives its first input's memory and runs no kernel."""
    return is_view(node) or (node.op == "call_function" and op_name(node.target) in _ALIASES)


def launches(node: fx.Node) -> int:
    """Kernels that `node` starts when it is run eagerly: 1, or 0 for a view, an input, an unpacking, an allocation."""
    return int(_counts(node) > 0 and not is_alias(node) and not op_name(node.target).startswith(_ALLOCATIONS))


def main_dtype(node: fx.Node) -> torch.dtype:
    """The dtype that the arithmetic of a matrix product runs in: its operands'."""
    for source in node.all_input_nodes:
        for tensor in tensors_of(source):
            if tensor.is_floating_point() or tensor.is_complex():
                return tensor.dtype
    return torch.float32
