"""A step on several ranks: how it is made, what it starts from, and when its ranks meet."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._program.program import Program
from fusion_compile._ranks.broadcast import from_the_first
from fusion_compile._ranks.division import FORMS, FULL, OPTIMIZER, REPLICATE, Division, divide
from fusion_compile._ranks.fingerprint import traffic
from fusion_compile._ranks.groups import ranks_of
from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state import keys
from fusion_compile._state.half_precision import shown_weights, unpacked
from fusion_compile._state.masters import with_written_weights
from fusion_compile._step.planned import Planned
from fusion_compile._step.pooled import reason_to_wait
from fusion_compile._step.pure_step import StepPlan
from fusion_compile._step.separable import is_entry_by_entry
from fusion_compile._types import Tensors


def meeting_of(
    mesh: Any, shard: str | None, reduce_dtype: torch.dtype | None, model: nn.Module, publish_every: int = 1
) -> Meeting | None:
    """The meeting of the ranks of ``mesh=``; None for one rank. All ranks call this together.

    Raises TypeError or ValueError for a mesh or a form that a step does not take; nobody waits then.
    """
    if shard is not None and shard not in FORMS:
        raise ValueError(f"shard={shard!r} is not known; use one of {', '.join(map(repr, FORMS))}, or None.")
    if reduce_dtype is not None and (not isinstance(reduce_dtype, torch.dtype) or not reduce_dtype.is_floating_point):
        raise ValueError(
            f"reduce_dtype={reduce_dtype!r} is no floating-point dtype; give torch.bfloat16, or leave it out."
        )
    if mesh is None:
        late = None if publish_every == 1 else publish_every
        for name, given in (("shard", shard), ("reduce_dtype", reduce_dtype), ("publish_every", late)):
            if given is not None:
                raise ValueError(
                    f"{name}={given!r} without mesh= has no effect; give the device mesh, or leave it out."
                )
        return None
    device = next((p.device.type for p in model.parameters()), "cpu")
    ranks = ranks_of(mesh, device)
    return None if ranks is None else Meeting(ranks)


def refuse_on_ranks(meeting: Meeting | None, *, granularity: str, program: object) -> None:
    """Raise ValueError for ways to compile that were not tried with collectives."""
    odd = {"granularity": granularity if granularity != "program" else None, "program": program}
    for name, given in odd.items() if meeting is not None else ():
        if given is not None:
            raise ValueError(
                f"{name}={given!r} with mesh=: a program that communicates is compiled as one, and by the process that "
                f"runs it. Leave {name} out."
            )


def divided(
    meeting: Meeting, planned: Planned, options: Any, shard: str | None, reduce_dtype: torch.dtype | None
) -> Planned:
    """`planned` for this rank's part of the banks, after all ranks have agreed on what they make."""
    form = _form(planned, shard)
    _refuse_full(options, form)
    _refuse_late(planned, options, form)
    given = {name: str(getattr(options, name)) for name in _AGREED}
    given |= {"optimizer": planned.transform.name, "shard": form, "reduce_dtype": str(reduce_dtype)}
    model = {p.name: (list(p.shape), bank.key) for bank in planned.layout.banks for p in bank.places}
    meeting.meet("makes a step", again=True, options=given, model=model)
    cuts = _cut_by_entry(planned, options) if form == FULL else ()
    order = [route.name for route in planned.routes]
    division = divide(meeting.ranks, planned.layout, form, order, reduce_dtype, cuts)
    division = replace(division, publishes=options.publish_every > 1)
    if form == FULL and not division.divided:
        raise ValueError(
            f"shard='full' with {planned.transform.name} divides nothing: the optimizer needs each parameter whole, "
            f"and no bank has a matrix for every rank. Give shard='replicate', or an optimizer that updates entry by "
            f"entry (adamw, lion)."
        )
    meeting.knows(division)
    if not division.divided:
        return planned
    return planned._replace(transform=planned.bind(division.owned.infos))


def _form(planned: Planned, shard: str | None) -> str:
    """The form that ``shard=`` means for this optimizer. Raises ValueError where it pools over all parameters without
    saying so, and the state was to be divided."""
    if shard == REPLICATE:
        return REPLICATE
    form = shard or OPTIMIZER
    transform = planned.transform.with_extras(bind=planned.bind)
    reason = reason_to_wait(transform, f"shard={form!r}", "Give shard='replicate'.")
    if reason and shard == FULL and transform.extras.pools:
        raise ValueError(
            f"shard='full' with {transform.name}: {reason} would need the parts of all ranks. Give shard='replicate', "
            f"with which each rank has all of them, or another optimizer."
        )
    if reason and shard is not None and not transform.extras.pools:
        raise ValueError(
            f"shard={form!r} with {transform.name}: {reason} would need the parts of all ranks, and the transform "
            f"does not say that it pools (Extras.pools). Give shard='replicate', with which each rank has all of them."
        )
    if reason and (shard is not None or not transform.extras.pools):
        warnings.warn(
            f"{transform.name}: {reason} would need the parts of all ranks, so each rank keeps the whole state, as "
            f"with shard='replicate'.",
            stacklevel=5,
        )
    return REPLICATE if reason else form


_SMALL = 16
"""A flat bank with less than one entry in so many stays whole on every rank: biases and norms beside matrices."""


def _cut_by_entry(planned: Planned, options: Any) -> list[str]:
    """Keys of the flat banks of which each rank keeps some entries: large ones, of an optimizer that takes each entry
    by itself."""
    transform, banks = planned.transform.with_extras(bind=planned.bind), planned.layout.banks
    if transform.extras.alignment > 1 or options.half_precision == "stochastic" or not is_entry_by_entry(transform):
        return []
    entries = {bank.key: math.prod(bank.shape) for bank in banks}
    return [b.key for b in banks if b.matrix is None and entries[b.key] * _SMALL >= sum(entries.values())]


def _refuse_full(options: Any, form: str) -> None:
    """Raise ValueError for what was not tried with weights that no rank has whole."""
    odd = {"ema": options.averages or None, "keep_gradients": options.keep_gradients, "dynamic": options.dynamic}
    for name, given in odd.items() if form == FULL else ():
        if given:
            raise ValueError(
                f"{name}= with shard='full': an average, a gradient and a symbolic program would need the weights of "
                f"all ranks. Leave {name} out, or give shard='optimizer'."
            )


_AGREED = (
    "accumulate",
    "skip_nonfinite",
    "compute_dtype",
    "mode",
    "backend",
    "keep_gradients",
    "half_precision",
    "weigh_by",
    "loss_scale",
    "publish_every",
)
"""Options that every rank gives alike."""


def _refuse_late(planned: Planned, options: Any, form: str) -> None:
    """Raise ValueError for ``publish_every=`` where the weights that a loss sees are the model's, or none are shown."""
    every, moves = options.publish_every, planned.transform.gradient_point is not None
    if every > 1 and (form != OPTIMIZER or not moves or options.averages):
        raise ValueError(
            f"publish_every={every} with shard={form!r}, {planned.transform.name}"
            f"{' and ema=' if options.averages else ''}: it is for Schedule-Free (sf_normuon, sf_adamw), whose loss "
            f"sees other weights than the model's, with shard='optimizer' and without ema=. Leave it out."
        )


def narrowed_of(meeting: Meeting | None) -> Any:
    """What an update plan needs to see a rank's part of the state; None where every rank has all."""
    division = None if meeting is None else meeting.division
    return division.narrowed if division is not None and division.divided else None


def share_weights(meeting: Meeting, model: nn.Module, banks: Tensors) -> None:
    """Let every rank have the first rank's weights, frozen parameters and buffers."""
    held = {id(p) for p in model.parameters() if p.requires_grad}
    rest = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in held]
    from_the_first([*banks.values(), *rest], meeting.ranks.everyone)
    seeds = meeting.channel.everyone_says(torch.initial_seed())
    if len({*seeds}) == 1:
        warnings.warn(
            f"all {len(seeds)} ranks have the random seed {seeds[0]}, so each draws the same noise for its part of a "
            f"batch; call torch.manual_seed(seed + rank) after building the model.",
            stacklevel=5,
        )


def share_state(division: Division, state: Tensors, banks: Tensors, *, moves: bool) -> None:
    """Divide the fresh `state` of this rank: whole banks where the model's lie, and one beginning for all ranks.

    `moves`: whether the loss is differentiated elsewhere than at the weights.
    """
    for key in division.divided if division.divides_weights else ():  # memory of their own; the whole will be freed
        state |= {k: state[k].clone() for k in (keys.params(key), keys.module(key)) if k in state}
    for key in () if division.divides_weights else division.divided:
        if division.whole.state_dtype == banks[key].dtype:
            del state[keys.params(key)]
        state[keys.module(key)] = banks[key]
    for key in division.divided if moves and division.form == OPTIMIZER else ():
        state[keys.point(key)] = banks[key].clone()
    for key in state:
        section, rest = keys.split(key)
        if section == keys.OPTIMIZER and rest.startswith("averages/"):
            bank = next((b for b in division.divided if rest.endswith(f"/{b}")), None)
            if bank is not None:
                state[key] = banks[bank].to(state[key].dtype, copy=True)
    for key, tensor in state.items():
        section, rest = keys.split(key)
        if section != keys.OPTIMIZER:
            continue
        share = division.shares.get(division.owned.bank_of(rest) or "")
        if share is None or share.inner is None:
            from_the_first([tensor], division.ranks.everyone)
        elif share.outer is not None:
            from_the_first([tensor], share.outer)


def communication(meeting: Meeting | None, programs: Sequence[Program]) -> list[tuple[str, int, int]]:
    """What the last program sends: ``(collective, how many, bytes that a rank sends)``."""
    return traffic(programs[-1].graph, meeting.groups) if meeting is not None and programs else []


def notes_of(meeting: Meeting | None) -> list[str]:
    """What `explain` says of the ranks."""
    if meeting is None or meeting.division is None:
        return []
    division, world = meeting.division, meeting.ranks.world
    whole = [key for key, share in division.shares.items() if share.inner is None]
    said = [f"{world} ranks train together, each on its own part of a batch."]
    for key, share in division.divided.items():
        if share.inner is not None:
            of = "matrices" if share.bank.matrix else "entries"
            said.append(
                f"{key}: this rank owns {share.kept} of {share.bank.length} {of}, divided among "
                f"{share.inner.size} ranks, {share.copies} copies."
            )
    if division.divides_weights:
        said.append("whole weights are gathered inside of a step, and each rank keeps its own between steps.")
    return [*said, f"each rank keeps the whole optimizer state of {', '.join(whole)}."] if whole else said


def put_point(plan: StepPlan, state: Tensors) -> None:
    """Gather the weights that the loss sees of divided banks into `state`, on all ranks together."""
    division, update = plan.division, plan.update
    assert division is not None
    with torch.no_grad():
        kept = with_written_weights(update.layout, division.narrowed(state))
        point = update.gradient_point(unpacked(update.layout, kept), update.context(state))
        if update.transform.gradient_point is None:
            point |= shown_weights(update.layout, kept)
        sent = {key: point[key].to(share.bank.dtype) for key, share in division.divided.items()}
        for key, bank in division.gathered(sent).items():
            if keys.point(key) in state:
                state[keys.point(key)].copy_(bank)
            else:
                state[keys.point(key)] = bank


def contents(named: Tensors) -> dict[str, int]:
    """A number for the bits of each tensor. Waits for the device."""
    return {name: int(_bits(tensor).sum()) for name, tensor in named.items()}


def _bits(tensor: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().reshape(-1).view(kinds[tensor.element_size()]).to(torch.int64)


def together(meeting: Meeting | None, act: str) -> contextlib.AbstractContextManager[None]:
    """Inside, this rank does `act` as the others do; nothing where it is alone."""
    return contextlib.nullcontext() if meeting is None else meeting.about_to(act, {})
