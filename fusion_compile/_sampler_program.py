"""One denoiser at one shape: graph, split, table, compiled body."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._conditioning_table import ConditioningTable, RequestSlot, bind_weights
from fusion_compile._denoiser_graph import Call, trace_denoiser
from fusion_compile._hoisted_weights import WeightWatch
from fusion_compile._lower import lower, resolve_mode
from fusion_compile._progress import stage
from fusion_compile._roles import BINDING_TIMES, Roles
from fusion_compile._sampler_report import SamplerReport
from fusion_compile._step_index import StepIndex
from fusion_compile.passes import BindingTime, count_launches, hoist_time_conditioning, pack_residuals
from fusion_compile.passes._compat import tree_unflatten

_REPLAYED = ("reduce-overhead", "max-autotune")
"""Modes in which the body's output lies in memory that the next call writes."""


class SamplerProgram:
    """Serves every call whose `Call.key` is that of the call it was built from.

    `early_names`, `body_names`: full names of the weights that the stages read and that the body reads. `launches`,
    `report()`: what was done. Raises ValueError if the schedule cannot be represented in the dtype of the step input.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: inspect.Signature,
        call: Call,
        roles: Roles,
        schedule: Tensor,
        *,
        exact: bool,
        mode: str | None,
        backend: str,
        byte_budget: int | None,
        n_slots: int,
    ) -> None:
        self._model_name = type(model).__name__
        self._roles, self._exact = roles, exact
        by_role = [roles.by_argument[owner] for owner in call.owners]
        self._at = {role: [i for i, r in enumerate(by_role) if r == role] for role in BINDING_TIMES}
        t = call.tensors[self._at["step"][0]]
        device = call.tensors[self._at["live"][0]].device
        self._mode = resolve_mode(mode, device)
        with stage(f"splitting {self._model_name}"):
            traced = trace_denoiser(model, signature, call)
            self._structure = traced.structure
            times = {n: BINDING_TIMES[r] for n, r in zip(traced.inputs, by_role, strict=True)}
            hoisted = hoist_time_conditioning(
                traced.graph_module, times, n_steps=len(schedule), byte_budget=byte_budget
            )
        body = hoisted.body.graph_module
        self.launches = (count_launches(traced.graph_module), count_launches(body))
        buffers, _ = pack_residuals(body, hoisted.residuals)
        prologue_mode = "max-autotune-no-cudagraphs" if self._mode in _REPLAYED else self._mode
        schedule = cast_schedule(schedule, t)
        self.timesteps = [value.expand(t.shape).clone() for value in schedule]
        self.table = ConditioningTable(
            hoisted,
            buffers,
            traced.weights,
            traced.inputs[self._at["step"][0]],
            self.timesteps,
            batched=not exact,
            n_slots=n_slots,
            lower=lambda fn: lower(fn, mode=prologue_mode, backend=backend),
        )
        left = bind_weights(body, {**traced.weights, **self.table.rows})
        self._live = tuple(map(traced.inputs.index, left))
        self._body_graph = body
        self._body = lower(body, mode=self._mode, backend=backend)
        self._request_names = tuple(traced.inputs[i] for i in self._at["request"])
        self._index = StepIndex(schedule, look_always=t.device.type == "cpu")
        self.steps = [torch.tensor([i], device=device) for i in range(len(schedule))]

        body_inputs = set(hoisted.body.inputs)
        early_inputs = {time: set(s.inputs) for time, s in hoisted.stages.items()}
        names = traced.full_names
        self.body_names = frozenset(names[n] for n in body_inputs if n in names)
        self.prologue_names = _names_read(names, early_inputs, (BindingTime.REQUEST, BindingTime.STEP_REQUEST))
        self.early_names = self.prologue_names | _names_read(names, early_inputs, (BindingTime.CONST, BindingTime.STEP))
        read = {names[n]: weight for n, weight in traced.weights.items() if n in names}
        self.watch = WeightWatch(model, read, self.early_names)
        self._facts = self._collect_facts(call, traced.weights, names, hoisted, buffers, byte_budget)

    def request(self, call: Call) -> dict[str, Tensor]:
        """The request's tensors of `call` by input name."""
        return {name: call.tensors[i] for name, i in zip(self._request_names, self._at["request"], strict=True)}

    def find(self, call: Call) -> tuple[Tensor, Tensor, bool | None]:
        """``(row [1] on the live device, known [], what the host knows of known)`` for the timestep of `call`."""
        step, known = self._index.find(call.tensors[self._at["step"][0]])
        verdict = self._index.host_knows(known)
        if step.device != self.steps[0].device:
            step = self.steps[int(step)]
        return step, known, verdict

    def run(self, slot: RequestSlot, step: Tensor, tensors: Sequence[Tensor], known: Tensor | None = None) -> Any:
        """The model's output at row `step` of `slot`; NaN where `known` ``[]`` is given and False.

        `tensors`: the tensors of a call; only live ones are read.
        """
        self.table.select(slot, step)
        out = self._body(*(tensors[i] for i in self._live))
        if known is not None:
            out = [torch.where(known, o, torch.nan) if o.is_floating_point() else o for o in out]
        elif self._mode in _REPLAYED:
            out = [o.clone() for o in out]
        return tree_unflatten(list(out), self._structure)

    def report(self, released: int) -> SamplerReport:
        """What was hoisted and declined."""
        return SamplerReport(**self._facts, measured_difference=self.table.measured_difference, released=released)

    def _collect_facts(
        self,
        call: Call,
        weights: Mapping[str, Tensor],
        names: Mapping[str, str],
        hoisted: Any,
        buffers: Any,
        byte_budget: int | None,
    ) -> dict[str, Any]:
        places: dict[str, dict[int, Tensor]] = {"table": {}, "prologue": {}, "body": {}}
        for node_name, full_name in names.items():
            place = (
                "body" if full_name in self.body_names else "prologue" if full_name in self.prologue_names else "table"
            )
            places[place][id(weights[node_name])] = weights[node_name]
        return {
            "model": self._model_name,
            "inputs": tuple(
                f"{owner} {str(t.dtype).removeprefix('torch.')}{list(t.shape)} {t.device}"
                for owner, t in zip(call.owners, call.tensors, strict=True)
            ),
            "roles": str(self._roles),
            "n_steps": len(self.timesteps),
            "mode": self._mode,
            "exact": self._exact,
            "nodes": {time.name.lower(): n for time, n in hoisted.node_times.items() if n},
            "body_nodes": sum(n.op == "call_function" for n in self._body_graph.graph.nodes),
            "launches": self.launches,
            "parameters": {place: sum(w.numel() for w in found.values()) for place, found in places.items()},
            "weight_bytes": {place: sum(map(_bytes, found.values())) for place, found in places.items()},
            "residuals": sum(len(b.slices) for b in buffers),
            "table_bytes": sum(
                b.total * b.dtype.itemsize * (len(self.timesteps) if b.time.per_step else 1) for b in buffers
            ),
            "byte_budget": "automatic" if byte_budget is None else f"{byte_budget / 2**20:.2f} MiB",
            "declined": hoisted.report.declined,
        }


def cast_schedule(schedule: Tensor, t: Tensor) -> Tensor:
    """`schedule` ``[n_steps]`` in the dtype and on the device of `t`; ValueError if an integer dtype cannot hold it."""
    cast = schedule.to(t.device, t.dtype)
    if not t.is_floating_point() and not torch.equal(cast.to(schedule.device, schedule.dtype), schedule):
        raise ValueError(
            f"the timestep is {t.dtype} and the schedule {schedule[:3].tolist()}… holds fractions; pass timesteps= "
            f"with the integers that the scheduler gives to the model."
        )
    return cast


def _names_read(
    names: Mapping[str, str], inputs: Mapping[BindingTime, set[str]], times: tuple[BindingTime, ...]
) -> frozenset[str]:
    return frozenset(names[n] for time in times for n in inputs.get(time, ()) if n in names)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
