"""What ranks that share DTensor parameters must have in common, and what cannot be done with such parameters."""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._ranks.shards.agreement import agree, of_all_ranks
from fusion_compile._ranks.shards.groups import group_of
from fusion_compile._ranks.shards.spread import local_part
from fusion_compile._say_once import SayOnce
from fusion_compile._state.kept_average import KeptAverage
from fusion_compile._step.separable import refuse_inseparable
from fusion_compile._torch_optim.group_numbers import as_float
from fusion_compile._torch_optim.group_record import GroupRecord
from fusion_compile._torch_optim.named_groups import STEPS
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._torch_optim.sharded_group import ShardedGroup
from fusion_compile._torch_optim.torch_words import MAXIMIZE
from fusion_compile.optim._resolve import OptimizerChoice
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

Options: TypeAlias = dict[str, Any]
"""One of ``param_groups``."""


class Inside(Protocol):
    """What is asked of an optimizer's inside (`GroupedUpdate`)."""

    source: OptimizerChoice
    transform: Transform
    numbers: Mapping[str, float | Schedule]
    model: nn.Module | None
    records: list[GroupRecord]
    averages: tuple[KeptAverage, ...]
    half_precision: str
    evaluating: bool
    released: Any
    loads: int
    warn: SayOnce

    def groups(self) -> Iterator[ParameterGroup]:
        """The groups that have taken a step."""


_REMEDY = "Do the same on every rank: the same optimizer, numbers, checkpoint and order of calls."


def without_data(members: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters of the same shapes without data, plain ones for DTensors too."""
    return {n: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for n, p in members.items()}


def refuse_spread(inside: Inside, members: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError for what cannot be done with DTensors among `members`."""
    name, p = next((n, p) for n, p in members.items() if _compat.is_spread_over_devices(p))
    which = f"{name} {list(p.shape)} is a DTensor, spread over several ranks"
    if inside.averages:
        raise ValueError(
            f"ema=…: {which}, and an average has no model to be shown in whose parameters lie so. Leave ema out, and "
            f"average with torch.optim.swa_utils.AveragedModel, or take Schedule-Free (sf_normuon, sf_adamw), whose "
            f"eval() is an average."
        )
    if inside.released is not None:
        raise ValueError(
            f"release_gradients=True: {which}, and its gradient is complete only when all ranks have added theirs. "
            f"Leave release_gradients out."
        )
    # What a recipe of this package declares is compared with a trial in the tests.
    if isinstance(inside.source, str) and not inside.transform.extras.pools:
        return
    refuse_inseparable(inside.transform)


def agree_on(
    inside: Inside,
    param_groups: Sequence[Options],
    doing: str,
    arrived: Sequence[Collection[str]] | None = None,
    also: bool = False,
) -> bool:
    """Whether `also` holds on any rank. RuntimeError on all ranks where they differ in what they are about to do.

    Without DTensors there is nobody to ask. Groups hear whether some rank's parameters were written. `doing`: in words.
    `arrived`: names of the parameters that have gradients, by group.
    """
    spread = [p for options in param_groups for p in _spread_in(options["params"])]
    if not spread:
        return also
    said = {
        "what they do": doing,
        "their optimizer": f"{inside.transform.name}, half_precision={inside.half_precision!r}",
        "their parameters": "; ".join(_parameters(inside, param_groups)),
        "the steps they have taken": "; ".join(
            f"{options[STEPS]} of parameter group {at}" for at, options in enumerate(param_groups)
        ),
        "their numbers": "; ".join(n for at, options in enumerate(param_groups) for n in _numbers(inside, at, options)),
        "how often a state was loaded": str(inside.loads),
        "train() and eval()": "eval" if inside.evaluating else "train",
    }
    if arrived is not None:
        lacking = [
            f"{n} has no gradient"
            for record, given in zip(inside.records, arrived, strict=True)
            for n in record.names
            if n not in given
        ]
        said["which parameters have a gradient"] = "; ".join(lacking)
    groups = [group for group in inside.groups() if isinstance(group, ShardedGroup)]
    written = any(group.is_written() for group in groups)
    for mesh in dict.fromkeys(p.device_mesh for p in spread):
        ranks = tuple(mesh.mesh.flatten().tolist())
        device = next(local_part(p).device for p in spread if p.device_mesh == mesh)
        if len(ranks) > 1:
            written, also = agree(group_of(ranks, mesh), said, device, [written, also], remedy=_REMEDY)
    for group in groups:
        group.written_anywhere = group.written_anywhere or written
    return also


def is_on_ranks(inside: Inside) -> bool:
    """Whether a group that has taken a step has DTensor parameters."""
    return any(isinstance(group, ShardedGroup) for group in inside.groups())


def measured_in(inside: Inside, *, several: bool) -> dict[str, Tensor]:
    """What parts measured in the last step; nothing where a rank's numbers are not all. `several`: parameter groups."""
    if inside.released is not None or is_on_ranks(inside):
        return {}
    measured = ((f"{group.at}/" if several else "", group.plan.diagnostics(group.state)) for group in inside.groups())
    return {prefix + name: value for prefix, found in measured for name, value in found.items()}


@contextlib.contextmanager
def stored_state(optimizer: torch.optim.Optimizer, inside: Inside) -> Iterator[None]:
    """``optimizer.state`` is for a while what is saved: of DTensor parameters not what this rank updates, but what lies
    where they do. All ranks enter at the same time."""
    state = optimizer.state
    if is_on_ranks(inside):
        agree_on(inside, optimizer.param_groups, "state_dict()")
        optimizer.state = _as_stored(inside, state)
    try:
        yield
    finally:
        optimizer.state = state


def _as_stored(inside: Inside, state: Mapping[Any, Any]) -> Any:
    shown = defaultdict(dict, state)
    for group in (group for group in inside.groups() if isinstance(group, ShardedGroup)):
        for name, parts in group.stored().items():
            p = group.covers[name]
            shown[p] = {**{k: v for k, v in state.get(p, {}).items() if k not in parts}, **parts}
    return shown


def refuse_copies(inside: Inside, what: str) -> None:
    """Raise TypeError for a copy of an optimizer whose state lies on several ranks. `what`: would be done to it."""
    if is_on_ranks(inside):
        raise TypeError(
            f"an optimizer of parameters on several ranks (DTensor) cannot be {what}: each rank has a part of its "
            f"state. Make another one with as_torch_optimizer, and give it the state: "
            f"other.load_state_dict(optimizer.state_dict()), on all ranks."
        )


def begins_step(
    inside: Inside, param_groups: Sequence[Options], arrived: Sequence[Mapping[str, Tensor]], *, dropped: bool
) -> bool:
    """Whether this is a step, on which all ranks agree, and not a question for the form of the state.

    torch.distributed.checkpoint asks so before it loads: a first step, without a rate and with zeros as gradients.
    `dropped`: somebody dropped state of this rank's.
    """
    if not any(arrived):
        _refuse_replaced(inside, param_groups)
    doing = "step after state was dropped" if dropped else "step"
    takes = agree_on(inside, param_groups, doing, arrived, not asks_for_form(inside, param_groups))
    if takes and not any(options[STEPS] for options in param_groups):
        _warn_of_unreduced(inside, param_groups)
    return takes


def _refuse_replaced(inside: Inside, param_groups: Sequence[Options]) -> None:
    """Raise RuntimeError for a step without any gradient whose parameters are no longer those of the model."""
    own = {id(p) for options in param_groups for p in options["params"]}
    now = dict(inside.model.named_parameters()) if inside.model is not None else {}
    if now and own.isdisjoint(map(id, now.values())):
        name, p = next(iter(now.items()))
        raise RuntimeError(
            f"no parameter has a gradient, and none is the model's any more: {name} {list(p.shape)} was replaced by "
            f"another after the optimizer was made, as fully_shard() does, or stood there for a forward alone. Make "
            f"the optimizer after fully_shard(), and where a forward came first, after model.reshard()."
        )


def asks_for_form(inside: Inside, param_groups: Sequence[Options]) -> bool:
    """Whether a step only asks for the form of the state."""
    if any(record.group is not None for record in inside.records):
        return False
    if any(options[STEPS] or as_float(options.get("lr", 1.0)) != 0.0 for options in param_groups):
        return False
    gradients = [p.grad for options in param_groups for p in options["params"] if p.grad is not None]
    return bool(gradients) and not any(bool(local_part(g).any()) for g in gradients)


def _spread_in(parameters: Sequence[Any]) -> list[Any]:
    # In one line for all: every step asks, and libraries load DTensor where nothing is spread.
    module = sys.modules.get("torch.distributed.tensor")
    return [] if module is None else [p for p in parameters if isinstance(p, module.DTensor)]


def _numbers(inside: Inside, at: int, options: Options) -> list[str]:
    record, found = inside.records[at], []
    for name in inside.numbers:
        shown, schedule = options.get(name), record.schedules.get(name)
        now = schedule(options[STEPS]) if schedule is not None else shown
        found.append(f"{name}={as_float(shown)!r}" + ("" if schedule is None else f" then {as_float(now)!r}"))
    found.append(f"maximize={bool(options.get(MAXIMIZE))}")
    return [f"{number} in parameter group {at}" for number in found]


def _parameters(inside: Inside, param_groups: Sequence[Options]) -> Iterable[str]:
    for record, options in zip(inside.records, param_groups, strict=True):
        if record.form is None:
            record.form = "; ".join(
                f"{n} {list(p.shape)} {p.dtype} {getattr(p, 'placements', '')}" for n, p in record.pairs(options)
            )
        yield record.form


def _warn_of_unreduced(inside: Inside, param_groups: Sequence[Options]) -> None:
    """Warn if plain parameters beside DTensors have other gradients on other ranks: nobody reduces them."""
    spread = [p for options in param_groups for p in _spread_in(options["params"])]
    plain = [
        (n, p)
        for record, options in zip(inside.records, param_groups, strict=True)
        for n, p in record.pairs(options)
        if not _compat.is_spread_over_devices(p) and p.grad is not None
    ]
    if not spread or not plain or spread[0].device_mesh.size() == 1:
        return
    mesh = spread[0].device_mesh
    group = group_of(tuple(mesh.mesh.flatten().tolist()), mesh)
    own = torch.stack([p.grad.double().norm() for _, p in plain if p.grad is not None])
    rows = of_all_ranks(group, own)
    differing = ~torch.isclose(rows, rows[:1], rtol=1e-5, atol=0.0, equal_nan=True).all(0)
    if bool(differing.any()):
        name, p = plain[int(differing.nonzero()[0])]
        inside.warn(
            "unreduced",
            f"{name} {list(p.shape)} is whole on every rank, and its gradient differs between ranks: nothing averages "
            f"it, so the ranks' copies part. Call fully_shard() on the root module too, or average its gradient "
            f"(torch.distributed.all_reduce) before optimizer.step().",
        )
