"""Derive the graph for given sizes from one graph traced with symbolic sizes, without tracing again."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx

from fusion_compile._compat import fake_mode, size_assumptions, size_expression
from fusion_compile._sampler.graph.call import Call, Dim, name_dim
from fusion_compile._sampler.graph.export import DenoiserGraph
from fusion_compile.passes._graph import is_assertion, tensor_of, value_of


class SymbolicGraph:
    """`traced`: the graph of a call, exported with some sizes symbolic; it stays as it is.

    The sizes of one call decide every branch that the trace takes, and torch records each as a condition on the
    symbols. Where all conditions hold, replacing symbols by numbers gives the graph that export would give.
    """

    def __init__(self, traced: DenoiserGraph) -> None:
        self.traced = traced
        by_name = {n.name: n for n in traced.graph_module.graph.find_nodes(op="placeholder")}
        inputs = [tensor_of(by_name[name]) for name in traced.inputs]
        assert all(value is not None for value in inputs)
        self._sizes = [[size_expression(s) for s in value.shape] for value in inputs if value is not None]
        self._strides = [[size_expression(s) for s in value.stride()] for value in inputs if value is not None]
        self._assumptions = size_assumptions(size for value in inputs if value is not None for size in value.shape)

    def fixed(self, asked: Iterable[Dim]) -> dict[Dim, str]:
        """The dimensions in `asked` that became numbers -> ``"file:line"`` that made them so, or ""."""
        numbers = {dim: self._sizes[dim[0]][dim[1]] for dim in asked}
        return {
            dim: next((a.where for a in self._assumptions if a.where and _equates(a.met, number)), "")
            for dim, number in numbers.items()
            if number.is_number
        }

    def refuses(self, call: Call) -> str | None:
        """Why the trace does not fit `call`, of the same family, or None if it does."""
        values: dict[Any, int] = {}
        for expression, size in self._pairs(call):
            _solve(expression, size, values)
        for tensor, (sizes, strides) in enumerate(zip(self._sizes, self._strides, strict=True)):
            for axis, size in enumerate(call.key.sizes[tensor]):
                if sizes[axis].xreplace(values) != size:
                    return f"{name_dim(call.owners, (tensor, axis))} is {size} and was traced as {sizes[axis]}"
            if not _same_layout([s.xreplace(values) for s in strides], call.tensors[tensor]):
                return f"{call.owners[tensor]} lies in memory with strides {list(call.tensors[tensor].stride())}"
        names = self._names(call)
        for assumption in self._assumptions:
            if assumption.holds.xreplace(values) == sympy.false:
                at = f" ({assumption.where})" if assumption.where else ""
                return f"the trace holds for {assumption.holds.xreplace(names)}{at}"
        return None

    def specialise(self, call: Call) -> DenoiserGraph:
        """The graph for the sizes of `call`, for which `refuses` gave None.

        Raises the error of any operator that cannot work at these sizes.
        """
        old = self.traced.graph_module
        graph = fx.Graph()
        known: dict[fx.Node, Any] = {}  # a node of the old graph -> one of the new, or the number that it is now
        given = dict(zip(self.traced.inputs, call.tensors, strict=True))
        with fake_mode(), torch.no_grad():
            for node in old.graph.nodes:
                value = _evaluate(node, old, known, given)
                if isinstance(value, (int, float)):
                    known[node] = value
                elif _takes_all(node, value, known):
                    known[node] = known[node.all_input_nodes[0]]
                elif not _is_settled(node):
                    fresh = graph.node_copy(node, known.__getitem__)
                    fresh.meta = {k: v for k, v in node.meta.items() if k not in _STALE} | {"val": value}
                    known[node] = fresh
        return replace(self.traced, graph_module=fx.GraphModule(old, graph)).tidied()

    def _pairs(self, call: Call) -> list[tuple[Any, int]]:
        """(expression, number) for every size of the inputs, plain symbols first."""
        pairs = [
            pair
            for expressions, sizes in zip(self._sizes, call.key.sizes, strict=True)
            for pair in zip(expressions, sizes, strict=True)
        ]
        return sorted(pairs, key=lambda pair: not pair[0].is_symbol)

    def _names(self, call: Call) -> dict[Any, Any]:
        """Symbols of input sizes -> symbols named after the arguments."""
        return {
            expression: sympy.Symbol(name_dim(call.owners, (tensor, axis)), integer=True, positive=True)
            for tensor, expressions in reversed([*enumerate(self._sizes)])
            for axis, expression in enumerate(expressions)
            if expression.is_symbol
        }


_STALE = ("val", "tensor_meta", "unbacked_bindings")
"""Metadata of a node that holds symbols."""


def _evaluate(node: fx.Node, owner: fx.GraphModule, known: Mapping[fx.Node, Any], given: Mapping[str, Tensor]) -> Any:
    """Evaluate `node` in a fake mode: a tensor without contents, or a number."""
    if node.op == "placeholder":
        like = given.get(node.name, tensor_of(node))
        assert like is not None
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(owner)
    if node.op == "output":
        return None
    assert callable(node.target)

    def value(argument: fx.Node) -> Any:
        now = known[argument]
        return value_of(now) if isinstance(now, fx.Node) else now

    return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))


def _takes_all(node: fx.Node, value: Any, known: Mapping[fx.Node, Any]) -> bool:
    """Whether `node` slices everything, which torch records only while a size is unknown."""
    return node.target is torch.ops.aten.slice.Tensor and value.shape == value_of(known[node.all_input_nodes[0]]).shape


def _is_settled(node: fx.Node) -> bool:
    """Whether `node` only checks numbers, and so has done its work when it was evaluated."""
    return is_assertion(node) and not any(isinstance(value_of(n), Tensor) for n in node.all_input_nodes)


def _solve(expression: Any, size: int, values: dict[Any, int]) -> None:
    """Solve `expression`, linear in one unknown symbol, for `size`; add nothing to `values` without a solution."""
    unknown = expression.free_symbols - values.keys()
    if len(unknown) != 1:
        return
    (symbol,) = unknown
    known = expression.xreplace(values)
    offset = known.xreplace({symbol: sympy.Integer(0)})
    slope = known.xreplace({symbol: sympy.Integer(1)}) - offset
    if slope.is_number and slope != 0 and (size - offset) % slope == 0:
        values[symbol] = sympy.Integer((size - offset) // slope)


def _same_layout(strides: Sequence[Any], tensor: Tensor) -> bool:
    """Whether `tensor` has the traced `strides`, ignoring dimensions of size 1 and tensors of one dimension."""
    return tensor.dim() < 2 or all(
        size < 2 or ours == theirs for size, ours, theirs in zip(tensor.shape, strides, tensor.stride(), strict=True)
    )


def _equates(condition: Any, number: Any) -> bool:
    return isinstance(condition, sympy.Equality) and number in condition.args
