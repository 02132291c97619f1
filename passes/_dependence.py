"""Binding times: when the value of each node of a sampler's graph becomes known."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import fx

from ._compat import has_unknown_size
from ._graph import impurity, op_name, tensor_of


class BindingTime(Enum):
    """When a value is known, from earliest to latest; the join of two is the union of what they depend on.

    CONST: from the weights. STEP: from the timestep, so once per schedule. REQUEST: from what is asked for (label,
    text, guidance), so once per image. STEP_REQUEST: from both, so once per image for all steps. LIVE: at the call
    only.
    """

    CONST = 0
    STEP = 1
    REQUEST = 2
    STEP_REQUEST = 3
    LIVE = 7

    def join(self, other: BindingTime) -> BindingTime:
        return BindingTime(min(self.value | other.value, BindingTime.LIVE.value))

    @property
    def per_step(self) -> bool:
        """Whether a value of this time differs from step to step of one schedule."""
        return self in (BindingTime.STEP, BindingTime.STEP_REQUEST)


def binding_times(graph: fx.Graph, roles: Mapping[str, BindingTime]) -> dict[fx.Node, BindingTime]:
    """The binding time of every node but the output.

    `roles` names placeholders; those left out are CONST. A node that draws random numbers or writes in place is LIVE:
    it must run at every call. Arguments of which only metadata is read count as dependencies here; run
    `drop_metadata_reads` first.
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
    """Why `node` can be in no table whatever it depends on, or None: it is impure, or no row holds its value."""
    value = tensor_of(node)
    if value is not None and has_unknown_size(value):
        return f"{op_name(node.target)} gives a tensor whose size depends on data"
    return impurity(node)
