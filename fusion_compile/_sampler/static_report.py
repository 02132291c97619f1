"""The part of a report that is known without running anything: what is read when, launches, and bytes of the table."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusion_compile._sampler.report import ProgramReport, RowKind
from fusion_compile._sampler.split import SplitDenoiser
from fusion_compile.passes import BindingTime, Hoisted, count_launches

PLACE_OF_TIME = {
    "const": "table",
    "step": "table",
    "request": "prologue",
    "step_request": "prologue",
    "live": "body",
    "unread": "unread",
}
"""By the time at which a weight is read last, the part of a sampler that reads it last."""


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


def static_report(split: SplitDenoiser, *, model: str, mode: str, rows: RowKind) -> ProgramReport:
    """The report on `split` of the class `model`, before its program has run."""
    hoisted, call, n_steps, budget = split.hoisted, split.call, split.n_steps, split.byte_budget
    body = hoisted.body.graph_module
    parameters: dict[str, int] = dict.fromkeys(PLACE_OF_TIME.values(), 0)
    weight_bytes = dict(parameters)
    for time_name, tensors in weights_by_time(split.traced.weights, split.full_names, hoisted).items():
        parameters[PLACE_OF_TIME[time_name]] += sum(w.numel() for w in tensors.values())
        weight_bytes[PLACE_OF_TIME[time_name]] += sum(w.nbytes for w in tensors.values())
    return ProgramReport(
        model=model,
        inputs=tuple(
            f"{owner} {str(t.dtype).removeprefix('torch.')}{list(t.shape)} {t.device}"
            for owner, t in zip(call.owners, call.tensors, strict=True)
        ),
        roles=str(split.roles),
        n_steps=n_steps,
        mode=mode,
        rows=rows,
        nodes={time.name.lower(): n for time, n in hoisted.node_times.items() if n},
        body_nodes=sum(n.op == "call_function" for n in body.graph.nodes),
        launches=(count_launches(split.traced.graph_module), count_launches(body)),
        parameters=parameters,
        weight_bytes=weight_bytes,
        residuals=sum(len(b.slices) for b in split.buffers),
        table_bytes=sum(b.total * b.dtype.itemsize * (n_steps if b.time.per_step else 1) for b in split.buffers),
        byte_budget="automatic" if budget is None else f"{budget / 2**20:.2f} MiB",
        declined=hoisted.report.declined,
    )
