"""The numbers of a split denoiser: what is read when, by how many launches, and what the table takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import Call, take_apart
from fusion_compile._sampler.graph.export import DenoiserGraph, trace_denoiser
from fusion_compile._sampler.graph.roles import BINDING_TIMES, Roles, assign_roles
from fusion_compile._sampler.report import SamplerReport
from fusion_compile.passes import (
    BindingTime,
    Hoisted,
    RowBuffer,
    count_launches,
    exchange_rates,
    hoist_time_conditioning,
    lay_out_residuals,
)

PLACE_OF_TIME = {
    "const": "table",
    "step": "table",
    "request": "prologue",
    "step_request": "prologue",
    "live": "body",
    "unread": "unread",
}
"""Where in a sampler a weight is read last, by when it is read last."""


def weights_by_time(
    weights: Mapping[str, Tensor], names: Mapping[str, str], hoisted: Hoisted
) -> dict[str, dict[str, Tensor]]:
    """When each parameter or buffer is read last: "const", …, "live" or "unread" -> {full name: tensor}.

    `weights`, `names`: of a `DenoiserGraph`. A tensor with several names counts once, at its latest time.
    """
    order = [*PLACE_OF_TIME]
    time_of: dict[str, str] = dict.fromkeys(names, "unread")
    for time in (BindingTime.CONST, BindingTime.STEP, BindingTime.REQUEST, BindingTime.STEP_REQUEST):
        if time in hoisted.stages:
            time_of.update(dict.fromkeys(set(hoisted.stages[time].inputs) & set(names), time.name.lower()))
    time_of.update(dict.fromkeys(set(hoisted.body.inputs) & set(names), "live"))
    latest: dict[int, str] = {}
    for node_name, time_name in time_of.items():
        key = id(weights[node_name])
        before = latest.get(key, "unread")
        if before == "unread" or (time_name != "unread" and order.index(time_name) > order.index(before)):
            latest[key] = time_name
    found: dict[str, dict[str, Tensor]] = {time_name: {} for time_name in order}
    seen: set[int] = set()
    for node_name, full_name in names.items():
        tensor = weights[node_name]
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[latest[id(tensor)]][full_name] = tensor
    return found


def sampler_facts(
    *,
    model_name: str,
    call: Call,
    roles: Roles,
    traced: DenoiserGraph,
    hoisted: Hoisted,
    buffers: Sequence[RowBuffer],
    n_steps: int,
    mode: str,
    exact: bool,
    byte_budget: int | None,
) -> dict[str, Any]:
    """The fields of a `SamplerReport` that are known without running anything."""
    body = hoisted.body.graph_module
    parameters: dict[str, int] = dict.fromkeys(PLACE_OF_TIME.values(), 0)
    weight_bytes = dict(parameters)
    for time_name, tensors in weights_by_time(traced.weights, traced.full_names, hoisted).items():
        parameters[PLACE_OF_TIME[time_name]] += sum(w.numel() for w in tensors.values())
        weight_bytes[PLACE_OF_TIME[time_name]] += sum(w.nbytes for w in tensors.values())
    return {
        "model": model_name,
        "inputs": tuple(
            f"{owner} {str(t.dtype).removeprefix('torch.')}{list(t.shape)} {t.device}"
            for owner, t in zip(call.owners, call.tensors, strict=True)
        ),
        "roles": str(roles),
        "n_steps": n_steps,
        "mode": mode,
        "exact": exact,
        "nodes": {time.name.lower(): n for time, n in hoisted.node_times.items() if n},
        "body_nodes": sum(n.op == "call_function" for n in body.graph.nodes),
        "launches": (count_launches(traced.graph_module), count_launches(body)),
        "parameters": parameters,
        "weight_bytes": weight_bytes,
        "residuals": sum(len(b.slices) for b in buffers),
        "table_bytes": sum(b.total * b.dtype.itemsize * (n_steps if b.time.per_step else 1) for b in buffers),
        "byte_budget": "automatic" if byte_budget is None else f"{byte_budget / 2**20:.2f} MiB",
        "declined": hoisted.report.declined,
    }


@dataclass(frozen=True)
class SamplerAnalysis:
    """What a sampler of a model would do. `weights`: when they are read last ("const", "step", "request",
    "step_request", "live", "unread") -> (how many, bytes)."""

    report: SamplerReport
    weights: dict[str, tuple[int, int]]


def analyse_denoiser(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    n_steps: int,
    exact: bool = True,
    roles: Mapping[str, str] | None = None,
    byte_budget: int | None = None,
) -> SamplerAnalysis:
    """Split `model` for one call and build nothing, at the prices of a GPU: tensors may be meta or fake tensors.

    Raises ValueError for a model that cannot be exported, TypeError for arguments that it does not take.
    """
    signature = inspect.signature(model.forward)
    call = take_apart(signature, args, kwargs)
    assigned = assign_roles(call.arguments, roles)
    traced = trace_denoiser(model, signature, call)
    times = {n: BINDING_TIMES[assigned.by_argument[o]] for n, o in zip(traced.inputs, call.owners, strict=True)}
    exchange = exchange_rates(torch.device("cuda"))
    hoisted = hoist_time_conditioning(
        traced.graph_module, times, n_steps=n_steps, byte_budget=byte_budget, exchange=exchange
    )
    buffers = lay_out_residuals(hoisted.body.graph_module, hoisted.residuals)
    facts = sampler_facts(
        model_name=type(model).__name__,
        call=call,
        roles=assigned,
        traced=traced,
        hoisted=hoisted,
        buffers=buffers,
        n_steps=n_steps,
        mode="not compiled",
        exact=exact,
        byte_budget=byte_budget,
    )
    weights = {
        time: (sum(w.numel() for w in tensors.values()), sum(w.nbytes for w in tensors.values()))
        for time, tensors in weights_by_time(traced.weights, traced.full_names, hoisted).items()
    }
    return SamplerAnalysis(SamplerReport(**facts, measured_difference=None, released=0), weights)
