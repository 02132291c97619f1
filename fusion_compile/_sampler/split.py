"""A denoiser's graph for one call, split by when its values become known."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fusion_compile._sampler.graph.call import Call
from fusion_compile._sampler.graph.export import DenoiserGraph
from fusion_compile._sampler.graph.roles import BINDING_TIMES, Role, Roles
from fusion_compile._sampler.rank.fit import RankConditioning
from fusion_compile.passes import (
    BindingTime,
    Exchange,
    Hoisted,
    RowBuffer,
    hoist_time_conditioning,
    lay_out_residuals,
)


@dataclass(frozen=True)
class SplitDenoiser:
    """The input of a program and of a report.

    `graph_module`: the whole graph that was split, in rank conditioning with factored layers. `times`: the binding time
    of each of its inputs that is no weight. `hoisted`, `buffers`: the split, and the packed rows that its body reads.
    `n_steps`, `byte_budget`: what the cost model reckoned with. `rank`: the fit of rank conditioning, or None.
    """

    call: Call
    roles: Roles
    traced: DenoiserGraph
    graph_module: fx.GraphModule
    times: dict[str, BindingTime]
    hoisted: Hoisted
    buffers: tuple[RowBuffer, ...]
    n_steps: int
    byte_budget: int | None
    rank: RankConditioning | None = None

    @property
    def full_names(self) -> dict[str, str]:
        """Input of the graph -> full name of the parameter or buffer."""
        return self.traced.full_names

    def positions(self, role: Role) -> list[int]:
        """Which of the call's tensors have `role`."""
        return [i for i, owner in enumerate(self.call.owners) if self.roles.by_argument[owner] == role]

    @property
    def timesteps(self) -> tuple[Tensor, ...]:
        """The timestep of the call, or all of them where the model has several clocks."""
        return tuple(self.call.tensors[i] for i in self.positions("step"))

    @property
    def step_inputs(self) -> tuple[str, ...]:
        """The graph's names for the timesteps."""
        return tuple(self.traced.inputs[i] for i in self.positions("step"))

    def copies_of(self, weights: Collection[str], requests: int) -> int:
        """Bytes of the values in the table that stand for `weights` (full names), with `requests` requests in it.

        They are values that are computed from these weights and nothing later, and the factors that rank conditioning
        has in place of layers, which a label decides too: then each request has its own.
        """
        const, request = self._bytes_from(BindingTime.CONST, weights), 0
        if self.rank is not None:
            request = self._bytes_from(BindingTime.REQUEST, weights, self.rank.is_fit)
        return const + requests * request

    def _bytes_from(
        self, time: BindingTime, weights: Collection[str], through: Callable[[fx.Node], bool] | None = None
    ) -> int:
        """Bytes of the values of the stage `time` that are computed from `weights`, by a node `through` if given."""
        stage = self.hoisted.stages.get(time)
        if stage is None:
            return 0
        reached: set[fx.Node] = set()
        counted: set[fx.Node] = set()
        graph = stage.graph_module.graph
        for node in graph.nodes:
            sources = node.all_input_nodes
            if (node.op == "placeholder" and self.full_names.get(str(node.target)) in weights) or any(
                source in reached for source in sources
            ):
                reached.add(node)
                if through is None or through(node) or any(source in counted for source in sources):
                    counted.add(node)
        outputs: Any = graph.output_node().args[0]
        copies = {name for name, node in zip(stage.outputs, outputs, strict=True) if node in counted}
        return sum(
            part.numel * buffer.dtype.itemsize
            for buffer in self.buffers
            if buffer.time is time
            for part in buffer.slices
            if part.name in copies
        )

    def read_by(self, inputs: Iterable[str]) -> frozenset[str]:
        """Full names of the weights among `inputs` of a stage."""
        return frozenset(self.full_names[name] for name in inputs if name in self.full_names)


def binding_times_of(traced: DenoiserGraph, call: Call, roles: Roles) -> dict[str, BindingTime]:
    """Input of the graph -> binding time, for the tensors of the call."""
    return {n: BINDING_TIMES[roles.by_argument[o]] for n, o in zip(traced.inputs, call.owners, strict=True)}


def split_denoiser(
    traced: DenoiserGraph,
    call: Call,
    roles: Roles,
    *,
    n_steps: int,
    byte_budget: int | None = None,
    rank: RankConditioning | None = None,
    exchange: Exchange | None = None,
) -> SplitDenoiser:
    """Split `traced`, which stays as it was.

    `exchange`: the prices of the cost model; None takes those of the device that the graph is on.
    """
    graph_module, times = traced.graph_module, binding_times_of(traced, call, roles)
    if rank is not None:
        graph_module, times = rank.factor(graph_module, times)
    hoisted = hoist_time_conditioning(graph_module, times, n_steps=n_steps, byte_budget=byte_budget, exchange=exchange)
    buffers = lay_out_residuals(hoisted.body.graph_module, hoisted.residuals)
    return SplitDenoiser(call, roles, traced, graph_module, times, hoisted, buffers, n_steps, byte_budget, rank)
