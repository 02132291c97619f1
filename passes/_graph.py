"""Small verbs on ``torch.fx`` graphs, and the printer that reports and goldens use."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from ._compat import OpOverload

RANDOM = torch.Tag.nondeterministic_seeded
MAY_COPY = ("to", "contiguous", "reshape", "flatten", "dropout")
"""Operators that return their input or a copy of it; counted as copies."""


def value_of(node: fx.Node) -> Any:
    """The fake tensor (or tuple of them, or scalar) recorded when `node` was traced; None when there is none."""
    value = node.meta.get("val")
    return node.meta.get("example_value") if value is None else value


def tensor_of(node: fx.Node) -> Tensor | None:
    """The one fake tensor that `node` gives, or None."""
    value = value_of(node)
    return value if isinstance(value, Tensor) else None


def bytes_of(node: fx.Node) -> int:
    """Bytes of the tensors that `node` gives; views count in full."""
    value = value_of(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def is_static(tensor: Tensor) -> bool:
    """Whether every size and stride is a plain int."""
    return all(type(size) is int for size in (*tensor.shape, *tensor.stride()))


def calls(graph: fx.Graph) -> list[fx.Node]:
    """Every node that computes: no inputs, attributes or output."""
    return [node for node in graph.nodes if node.op in ("call_function", "call_method", "call_module")]


def is_assertion(node: fx.Node) -> bool:
    """Whether `node` only checks something: metadata, ranges of symbols, device-side asserts."""
    name = op_name(node.target)
    return node.op == "call_function" and not node.users and name.startswith(("_assert", "sym_constrain_range"))


def is_view(node: fx.Node) -> bool:
    """Whether `node` may share storage with its first argument, and writes nothing (getitem of a view included)."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_view(source)
    schema = getattr(node.target, "_schema", None)
    if schema is None or op_name(node.target) in MAY_COPY:
        return False
    aliases = [argument.alias_info for argument in schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def impurity(node: fx.Node) -> str | None:
    """Why two evaluations of `node` on equal inputs may differ or have an effect, or None."""
    if node.op == "call_method" and str(node.target).endswith("_") and not str(node.target).endswith("__"):
        return f"{node.target} writes its input in place"
    if isinstance(node.target, OpOverload):
        if RANDOM in node.target.tags and not _draws_nothing(node, node.target):
            return f"{op_name(node.target)} draws random numbers"
        if node.target._schema.is_mutable:
            return f"{op_name(node.target)} writes its input in place"
    return None


def _draws_nothing(node: fx.Node, target: OpOverload) -> bool:
    """Whether this call of a random operator draws nothing: attention without dropout, dropout that is off."""
    given = {a.name: a.default_value for a in target._schema.arguments}
    given |= dict(zip(given, node.args, strict=False)) | node.kwargs
    return given.get("dropout_p") == 0 or given.get("train") is False or given.get("training") is False


def op_name(target: Callable[..., Any] | str) -> str:
    """``"silu"`` for aten.silu.default, for torch.nn.functional.silu and for the method name ``"silu"``."""
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return target._schema.name.partition("::")[2]
    return str(getattr(target, "__name__", target))


def dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which `tensor` lies in memory without gaps, or None if it has gaps or overlaps."""
    order = sorted(range(tensor.dim()), key=lambda d: (tensor.stride(d), tensor.shape[d]), reverse=True)
    expected = 1
    for d in reversed(order):
        if tensor.shape[d] != 1 and tensor.stride(d) != expected:
            return None
        expected *= tensor.shape[d]
    return tuple(order)


def format_node(node: fx.Node) -> str:
    """Print one node: ``silu: float32[2, 4] = aten.silu.default(t_1)``.

    Args:
        node: A node with ``meta["val"]`` or ``meta["example_value"]``.

    Returns:
        One line, with "?" where the value is unknown.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import format_node
        >>> graph = make_fx(lambda x: x.sin(), tracing_mode="fake")(torch.ones(2)).graph
        >>> format_node(list(graph.nodes)[1])
        'sin: float32[2] = aten.sin.default(x_1)'
    """
    if node.op == "placeholder":
        return f"{node.name}: {_format_value(value_of(node))} = input"
    arguments = ", ".join(
        [*map(_format_argument, node.args), *(f"{k}={_format_argument(v)}" for k, v in node.kwargs.items())]
    )
    if node.op == "output":
        return f"return {arguments}"
    target = str(node.target) if isinstance(node.target, (str, OpOverload)) else op_name(node.target)
    call = target if node.op == "get_attr" else f"{target}({arguments})"
    return f"{node.name}: {_format_value(value_of(node))} = {call}"


def format_graph(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> str:
    """Print a graph, one line for each node; inputs that nothing reads are left out.

    Args:
        graph: The graph.
        nodes: Print these nodes instead of all.

    Returns:
        The lines, joined.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import format_graph
        >>> print(format_graph(make_fx(lambda x: x.sin(), tracing_mode="fake")(torch.ones(2)).graph))
        x_1: float32[2] = input
        sin: float32[2] = aten.sin.default(x_1)
        return sin
    """
    chosen = [n for n in graph.nodes if n.op != "placeholder" or n.users] if nodes is None else nodes
    return "\n".join(map(format_node, chosen))


def _format_value(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_format_value, value))})"
    return "?" if value is None else type(value).__name__


def _format_argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return argument.name
    if isinstance(argument, (tuple, list)):
        return f"[{', '.join(map(_format_argument, argument))}]"
    if isinstance(argument, float) and math.isfinite(argument):
        return f"{argument:.6g}"
    return str(argument)
