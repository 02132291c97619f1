"""Binding times: when the value of each node of a sampler's graph becomes known."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import fx

from ._compat import has_unknown_size
from ._graph import impurity, op_name, tensor_of


class BindingTime(Enum):
    """When a value is known, from earliest to latest; the join of two is the union of what they depend on.

    CONST: from the weights. STEP: from the timestep, so once per schedule. REQUEST: from the request (label, text,
    guidance), so once per image. STEP_REQUEST: from both, so once per image for all steps. LIVE: only at the call.
    """

    CONST = 0
    STEP = 1
    REQUEST = 2
    STEP_REQUEST = 3
    LIVE = 7

    def join(self, other: BindingTime) -> BindingTime:
        """Combine the binding times of two operands.

        Args:
            other: The other operand's.

        Returns:
            The earliest time at which both are known.
        """
        return BindingTime(min(self.value | other.value, BindingTime.LIVE.value))

    @property
    def per_step(self) -> bool:
        """Whether a value of this time differs from step to step of a trajectory."""
        return self in (BindingTime.STEP, BindingTime.STEP_REQUEST)


def binding_times(graph: fx.Graph, roles: Mapping[str, BindingTime]) -> dict[fx.Node, BindingTime]:
    """Find the binding time of every node but the output.

    A node that draws random numbers, writes in place or has a size that depends on data is LIVE: it must run at every
    call. An argument of which only metadata is read counts as a dependency here; run `drop_metadata_reads` first.

    Args:
        graph: An ATen graph with ``meta["val"]``.
        roles: Name of a placeholder -> its time. Placeholders that are left out are weights, which are CONST.

    Returns:
        Node -> binding time.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import BindingTime, binding_times
        >>> graph = make_fx(lambda t, w: t.sin() * w, tracing_mode="fake")(torch.ones(2), torch.ones(2)).graph
        >>> [time.name for time in binding_times(graph, {"t_1": BindingTime.STEP}).values()]
        ['STEP', 'CONST', 'STEP', 'STEP']
    """
    times: dict[fx.Node, BindingTime] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        time = roles.get(node.name, BindingTime.CONST) if node.op == "placeholder" else BindingTime.CONST
        for source in node.all_input_nodes:
            time = time.join(times[source])
        times[node] = BindingTime.LIVE if why_at_every_call(node) else time
    return times


def why_at_every_call(node: fx.Node) -> str | None:
    """Why no table can hold the value of `node`, whatever it depends on; None if one can."""
    value = tensor_of(node)
    if value is not None and has_unknown_size(value):
        return f"{op_name(node.target)} gives a tensor whose size depends on data"
    return impurity(node)
