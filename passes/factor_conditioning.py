"""Replace linear layers of a conditioning vector by their restriction to the few directions in which it moves.

In an adaLN model every modulation is ``W g(t) + b`` of one vector g, ``[rows, in]``. Over all t, g stays close to an
affine subspace ``m + E c`` of low dimension, E ``[in, rank]`` with orthonormal columns. Then ``c = (g - m) E`` is
computed once for all layers that read g, each layer becomes ``c (E^T W^T) + (m W^T + b)``, and W is read no more:

    before   mod = linear(g, W [out, in], b)
    after    m, E, factor, offset = fit(W, b, what else decides g but t)
             mod = addmm(offset [rows, out], (g - m) E [rows, rank], factor [rank, out])

What computes g stays as it is, so any t is served without a table. The fit does not depend on t; it is known with the
weights, or with the request where g depends on it, and can be hoisted out of the loop as any such value. Approximate.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ._compat import tree_flatten
from ._conditioning_layers import LinearLayer, ancestors, choose_groups, factorable_layers, rows_and_width
from ._dependence import BindingTime, binding_times
from ._graph import bytes_of, calls, tensor_of
from ._pass import Declined, PassReport
from .hoist_time_conditioning import Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class FactoredLayer:
    """One linear layer that is replaced. `node`: what it was called.

    `operands`: a stage of weights that gives ``(matrix,)`` or ``(matrix, bias)``; `transposed`: whether the matrix is
    ``[out, in]``. `dtype`: of its factor and its offset.
    """

    node: str
    operands: Stage
    transposed: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class Curve:
    """A conditioning vector that `layers` read, as a function of the timestep.

    `source`: a stage that computes it, of `shape` ``(rows, in)`` up to leading dimensions. `step_input`: the timestep's
    name among the inputs of `source`. `dtype`: of mean and basis. `inputs`: the inputs of `source` and of all operands,
    without the timestep.
    """

    node: str
    source: Stage
    step_input: str
    shape: tuple[int, int]
    dtype: torch.dtype
    layers: tuple[FactoredLayer, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        stages = (self.source, *(layer.operands for layer in self.layers))
        return tuple({name: None for stage in stages for name in stage.inputs if name != self.step_input})


Fit = Callable[..., Sequence[Tensor]]
"""``fit(*values of Curve.inputs)`` returns mean ``[rows, in]`` and basis ``[in, rank]`` in the curve's dtype, then for
each layer factor ``[rank, out]`` and offset ``[rows, out]`` in the layer's dtype."""


@dataclass(frozen=True)
class Factored:
    """What `factor_conditioning` did.

    `weight_bytes`: of the weights that only fits read now. `factor_bytes`: of everything that fits return.
    """

    curves: tuple[Curve, ...]
    weight_bytes: int
    factor_bytes: int
    report: PassReport


def factor_conditioning(
    graph_module: fx.GraphModule,
    roles: Mapping[str, BindingTime],
    *,
    rank: int,
    covers: tuple[float, float],
    fit: Callable[[Curve], Fit],
) -> Factored:
    """Factor, in place, every layer of a value known from timestep (and request) where that saves bytes.

    Approximate. A layer between the timestep and a factored layer stays, so that coefficients are those of the true
    vector. Early nodes that compute the same are merged.

    Args:
        graph_module: An ATen graph with ``meta["val"]`` and static sizes.
        roles: Binding time of each placeholder, one of which is STEP. Placeholders that are left out are weights.
        rank: Dimensions of the subspace.
        covers: First and last timestep that `fit` evaluates. Beyond them the coefficients are NaN, because a guess
            would look like an answer.
        fit: Gives the function that fits a curve.

    Returns:
        The curves, the bytes and the report.

    Raises:
        ValueError: For a rank below 1.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import BindingTime, factor_conditioning
        >>> def model(x, t, early, w):
        ...     return x * (torch.tanh(t[:, None] @ early) @ w)
        >>> inputs = torch.ones(2, 48), torch.ones(2), torch.ones(1, 32), torch.ones(32, 48)
        >>> graph_module = make_fx(model, tracing_mode="fake")(*inputs)
        >>> roles = {"x_1": BindingTime.LIVE, "t_1": BindingTime.STEP}
        >>> done = factor_conditioning(graph_module, roles, rank=4, covers=(0, 1), fit=lambda curve: lambda *values: ())
        >>> [(curve.node, len(curve.layers)) for curve in done.curves], done.weight_bytes
        ([('tanh', 1)], 6144)
    """
    if rank < 1:
        raise ValueError(f"rank={rank}; a subspace has at least one dimension.")
    graph = graph_module.graph
    before = len(calls(graph))
    _merge_equals(graph, binding_times(graph, roles))
    times = binding_times(graph, roles)
    groups, declined = factorable_layers(graph, times, rank)
    chosen = choose_groups(groups, rank, declined)
    step = next(n for n in graph.find_nodes(op="placeholder") if times[n] is BindingTime.STEP)
    outside = _outside(graph, step, covers) if chosen else step
    curves = []
    fits: set[fx.Node] = set()
    for root, layers in chosen.items():
        curve = _curve(graph_module, root, layers, step)
        fits.add(_rewrite(graph, curve, root, layers, rank, fit(curve), outside))
        curves.append(curve)
    graph.eliminate_dead_code()
    graph.lint()
    graph_module.recompile()
    placeholders = graph.find_nodes(op="placeholder")
    weight_bytes = sum(bytes_of(n) for n in placeholders if n.users and set(n.users) <= fits and n.name not in roles)
    factor_bytes = sum(map(bytes_of, fits))
    report = PassReport(
        "factor_conditioning",
        False,
        sum(len(curve.layers) for curve in curves),
        before,
        len(calls(graph)),
        bytes_added=factor_bytes,
        declined=tuple(Declined(node, reason) for node, reason in declined.items()),
    )
    return Factored(tuple(curves), weight_bytes, factor_bytes, report)


def _merge_equals(graph: fx.Graph, times: Mapping[fx.Node, BindingTime]) -> None:
    """Merge early nodes that compute the same: each block of a DiT takes the SiLU of one vector again."""
    seen: dict[tuple[Any, ...], fx.Node] = {}
    for node in calls(graph):
        if times[node] is BindingTime.LIVE:
            continue
        leaves, structure = tree_flatten((node.args, node.kwargs))
        described = tuple(x if isinstance(x, fx.Node) else (type(x), repr(x)) for x in leaves)
        first = seen.setdefault((node.target, described, repr(structure)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _outside(graph: fx.Graph, step: fx.Node, covers: tuple[float, float]) -> fx.Node:
    """Whether any timestep lies outside the range, ``[]`` bool."""
    with graph.inserting_before(_first_call(step)):
        low, high = _call(graph, aten.lt.Scalar, step, covers[0]), _call(graph, aten.gt.Scalar, step, covers[1])
        return _call(graph, aten.any.default, _call(graph, aten.logical_or.default, low, high))


def _curve(graph_module: fx.GraphModule, root: fx.Node, layers: Sequence[LinearLayer], step: fx.Node) -> Curve:
    value = tensor_of(root)
    assert value is not None
    factored = []
    for layer in layers:
        out = tensor_of(layer.node)
        assert out is not None
        operands = _stage(graph_module, [n for n in (layer.matrix, layer.bias) if n is not None])
        factored.append(FactoredLayer(layer.node.name, operands, layer.transposed, out.dtype))
    wide = torch.promote_types(value.dtype, torch.float32)  # what moves may be small beside the mean
    source = _stage(graph_module, [root])
    return Curve(root.name, source, str(step.target), rows_and_width(root), wide, tuple(factored))


def _rewrite(
    graph: fx.Graph,
    curve: Curve,
    root: fx.Node,
    layers: Sequence[LinearLayer],
    rank: int,
    fit: Fit,
    outside: fx.Node,
) -> fx.Node:
    """Replace `layers` by the node of the fit and its readers; return that node."""
    value = tensor_of(root)
    assert value is not None
    rows, width = curve.shape
    examples = [value.new_empty(rows, width, dtype=curve.dtype), value.new_empty(width, rank, dtype=curve.dtype)]
    for layer, factored in zip(layers, curve.layers, strict=True):
        columns = layer.sizes[1]
        examples += [value.new_empty(n, columns, dtype=factored.dtype) for n in (rank, rows)]
    inputs = {str(n.target): n for n in graph.find_nodes(op="placeholder")}
    with graph.inserting_before(_first_call(root)):
        fitted = graph.call_function(fit, tuple(inputs[name] for name in curve.inputs))
        fitted.meta["val"] = tuple(examples)
        mean, basis, *operands = (_call(graph, operator.getitem, fitted, i) for i in range(len(examples)))
        flat = _call(graph, aten.reshape.default, root, [rows, width])
        if value.dtype != curve.dtype:
            flat = _call(graph, aten._to_copy.default, flat, dtype=curve.dtype)
        coefficients = _call(graph, aten.mm.default, _call(graph, aten.sub.Tensor, flat, mean), basis)
        if outside.meta["val"].device != value.device:
            outside = _call(graph, aten._to_copy.default, outside, device=value.device)
        coefficients = _call(graph, aten.masked_fill.Scalar, coefficients, outside, math.nan)
        cast = {curve.dtype: coefficients}
        for dtype in {layer.dtype: None for layer in curve.layers if layer.dtype != curve.dtype}:
            cast[dtype] = _call(graph, aten._to_copy.default, coefficients, dtype=dtype)
    for i, (layer, factored) in enumerate(zip(layers, curve.layers, strict=True)):
        out = tensor_of(layer.node)
        assert out is not None
        with graph.inserting_before(layer.node):
            factor, offset = operands[2 * i : 2 * i + 2]
            product = _call(graph, aten.addmm.default, offset, cast[factored.dtype], factor)
            if product.meta["val"].shape != out.shape:
                product = _call(graph, aten.view.default, product, list(out.shape))
        layer.node.replace_all_uses_with(product)
        graph.erase_node(layer.node)
    return fitted


def _first_call(node: fx.Node) -> fx.Node:
    """The first node after `node` that is no placeholder."""
    node = node.next
    while node.op == "placeholder":
        node = node.next
    return node


def _call(graph: fx.Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args), **kwargs)
    return node


def _stage(graph_module: fx.GraphModule, outputs: Sequence[fx.Node]) -> Stage:
    """A graph of its own that computes `outputs` from the inputs of the whole."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    needed = ancestors(outputs)
    for node in graph_module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in outputs))
    inputs = tuple(str(n.target) for n in graph.find_nodes(op="placeholder"))
    return Stage(fx.GraphModule(graph_module, graph), inputs, tuple(n.name for n in outputs))
