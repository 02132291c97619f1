"""Replace operators that read only the metadata of an argument, so that the graph shows true dependencies.

    type_as(temb, text)    ->  _to_copy(temb, dtype=…, device=…)
    zeros_like(x)          ->  full([2, 4], 0, dtype=…, device=…)
    expand_as(bias, x)     ->  expand(bias, [2, 4])

``temb.type_as(text)`` does not depend on the text, nor ``torch.zeros_like(x)`` on the latent, but as written both tie
early values to late ones. An exported graph knows shapes, dtypes and devices, so each becomes an operator without that
argument. Assertions that nothing reads, which export leaves in great number, are dropped as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ._compat import OpOverload
from ._graph import calls, is_assertion, is_static, op_name, tensor_of
from ._pass import Declined, PassReport

aten = torch.ops.aten

_FILLED = {"zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}


def drop_metadata_reads(graph_module: fx.GraphModule) -> PassReport:
    """Rewrite type_as, expand_as, view_as, reshape_as, {zeros,ones,full}_like and new_{zeros,ones,full}, in place.

    Exact. Declined are tensors of symbolic size, and copies of a memory format that is not contiguous.

    Args:
        graph_module: An ATen graph with ``meta["val"]``.

    Returns:
        The report; `changed` counts rewritten calls and dropped assertions.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import drop_metadata_reads, format_graph
        >>> graph_module = make_fx(lambda x: torch.zeros_like(x), tracing_mode="fake")(torch.ones(2))
        >>> drop_metadata_reads(graph_module).changed
        1
        >>> print(format_graph(graph_module.graph))
        full_default: float32[2] = aten.full.default([2], 0, dtype=torch.float32, device=cpu)
        return full_default
    """
    graph = graph_module.graph
    before = len(calls(graph))
    changed = 0
    declined: list[Declined] = []
    for node in calls(graph):
        if is_assertion(node):
            graph.erase_node(node)
            changed += 1
            continue
        rewrite = _rewrite_of(node)
        out = tensor_of(node)
        if rewrite is None or out is None:
            continue
        if not is_static(out):
            declined.append(Declined(node.name, f"{op_name(node.target)} gives a tensor of symbolic size"))
            continue
        if not out.is_contiguous() and op_name(node.target) in _FILLED:
            declined.append(
                Declined(node.name, f"{op_name(node.target)} copies a memory format that is not contiguous")
            )
            continue
        with graph.inserting_before(node):
            replacement = rewrite(node, out)
        if replacement is not node.args[0]:
            replacement.meta.update(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        changed += 1
    graph_module.recompile()
    return PassReport("drop_metadata_reads", True, changed, before, len(calls(graph)), declined=tuple(declined))


def _rewrite_of(node: fx.Node) -> Callable[[fx.Node, Tensor], fx.Node] | None:
    if not isinstance(node.target, OpOverload):
        return None
    name = op_name(node.target)
    if name in _FILLED or name in ("full_like", "new_full"):
        return _full
    return {"type_as": _type_as, "expand_as": _expand, "view_as": _view, "reshape_as": _reshape}.get(name)


def _full(node: fx.Node, out: Tensor) -> fx.Node:
    name = op_name(node.target)
    at = 1 if name == "full_like" else 2
    fill = _FILLED[name] if name in _FILLED else node.args[at] if len(node.args) > at else node.kwargs["fill_value"]
    metadata: dict[str, Any] = {"dtype": out.dtype, "device": out.device}
    return node.graph.call_function(aten.full.default, (list(out.shape), fill), metadata)


def _type_as(node: fx.Node, out: Tensor) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before = tensor_of(source)
    if before is not None and (before.dtype, before.device) == (out.dtype, out.device):
        return source
    return node.graph.call_function(aten._to_copy.default, (source,), {"dtype": out.dtype, "device": out.device})


def _expand(node: fx.Node, out: Tensor) -> fx.Node:
    return node.graph.call_function(aten.expand.default, (node.args[0], list(out.shape)))


def _view(node: fx.Node, out: Tensor) -> fx.Node:
    return node.graph.call_function(aten.view.default, (node.args[0], list(out.shape)))


def _reshape(node: fx.Node, out: Tensor) -> fx.Node:
    return node.graph.call_function(aten.reshape.default, (node.args[0], list(out.shape)))
