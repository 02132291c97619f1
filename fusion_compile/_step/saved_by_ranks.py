"""A divided state as a checkpoint has it, by parameter name, and back.

Each rank writes what it owns, and any number of ranks, in either form, load it, and so does a step without
torch.distributed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusion_compile._ranks.division import FULL, Division
from fusion_compile._ranks.meeting import Meeting
from fusion_compile._state import keys
from fusion_compile._state.named_state import kept_parts, named_state
from fusion_compile._step.update import UpdatePlan
from fusion_compile._types import Tensors

_OF_RANK = "rank{}/"
"""Before the names of the random states of ranks other than the first."""


def assembled(division: Division, state: Tensors) -> Tensors:
    """`state` with whole tensors, on the CPU, in the place of parts. All ranks call this together."""
    with torch.no_grad():
        whole = {key: division.assembled(bank, state[key]).cpu() for key, bank in division.parts(state).items()}
    return {**state, **whole}


def written_here(division: Division, saved: Mapping[str, Tensors], state: Tensors) -> Tensors:
    """What this rank writes into a checkpoint, by ``<section>.<name>``, copied to the CPU: what it owns, and its share
    of what all ranks have. No rank writes what another does.

    `state`: with whole tensors where weights are divided, whose ranges of entries are no parameters. `saved`: sections
    that all ranks have alike; ``rng`` this rank's own, ``carried`` the first one's.
    """
    rank, parts = division.ranks.rank, {} if division.form == FULL else division.parts(state)
    modules = keys.MODULE + "/"
    shown = {key: tensor for key, tensor in state.items() if key.startswith(modules)}
    mine = {key: state[key] for key, bank in parts.items() if division.writes(bank)} | shown
    rest = {key: tensor for key, tensor in state.items() if key not in parts}
    own = {f"optimizer.{name}": t for name, t in named_state(division.owned, mine).items()}
    numbers = {part for part, bank, _ in kept_parts(division.whole, rest) if bank is None}
    whole = {f"optimizer.{name}": t for name, t in named_state(division.whole, rest).items()}
    first = {f"optimizer.{part}" for part in numbers}
    for section, named in saved.items():
        if section == "rng":
            own |= {f"rng.{name if rank == 0 else _OF_RANK.format(rank) + name}": t for name, t in named.items()}
        else:
            whole |= {f"{section}.{name}": t for name, t in named.items()}
            first |= {f"{section}.{name}" for name in named if section != "model"}
    own |= {key: whole[key] for key in (first if rank == 0 else ())}
    own |= {key: whole[key] for key in _shared_out({k: t for k, t in whole.items() if k not in first}, division)}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in own.items()}


def _shared_out(whole: Tensors, division: Division) -> list[str]:
    """The keys of `whole` that this rank writes: each has about as many bytes."""
    bytes_of, found = [0] * division.ranks.world, []
    for key in sorted(whole, key=lambda key: (-whole[key].nbytes, key)):
        rank = bytes_of.index(min(bytes_of))
        bytes_of[rank] += whole[key].nbytes
        if rank == division.ranks.rank:
            found.append(key)
    return found


def stacks_of(division: Division) -> dict[str, Any]:
    """The stacks that are written matrix by matrix: see `checkpoint_parts.with_whole_stacks`."""
    return {
        place.name: {"shape": [*place.shape], "matrix": [*share.bank.matrix]}
        for share in division.divided.values()
        if share.bank.matrix is not None and division.form != FULL
        for place, count in zip(share.bank.places, share.bank.matrices, strict=True)
        if count > 1
    }


def room_for_whole(division: Division, state: Tensors) -> Tensors:
    """`state` with empty whole tensors, on the CPU, in the place of parts."""
    room: Tensors = {}
    for key, bank in division.parts(state).items():
        length = division.shares[bank].bank.length
        room[key] = torch.empty((length, *state[key].shape[1:]), dtype=state[key].dtype)
    return {**state, **room}


def put_parts(division: Division, state: Tensors, whole: Tensors) -> None:
    """Copy this rank's parts of `whole`, which `room_for_whole` or `assembled` made, into `state`."""
    with torch.no_grad():
        for key, bank in division.parts(state).items():
            state[key].copy_(division.shares[bank].own(whole[key]))


def begin_parts(division: Division, update: UpdatePlan, banks: Tensors, state: Tensors) -> None:
    """Put `banks`, the model's, and a fresh state of the transform into `state`, averages too."""
    update.begin_at(division.own(banks), division.narrowed(state))
    with torch.no_grad():
        for key, bank in division.kept_whole(state):
            if keys.split(key)[0] == keys.OPTIMIZER:
                state[key].copy_(banks[bank])


def random_states(meeting: Meeting, own: Tensors) -> Tensors:
    """The random states of all ranks, those of the first under their own names."""
    heard = meeting.channel.everyone_says({name: state.cpu() for name, state in own.items()})
    found: Tensors = dict(heard[0])
    for rank, states in enumerate(heard[1:], 1):
        found |= {_OF_RANK.format(rank) + name: state for name, state in states.items()}
    return found


def with_own_random_state(meeting: Meeting, saved: Mapping[str, Any]) -> dict[str, Any]:
    """`saved` with this rank's random state alone; with none, and a warning, where the checkpoint has no such rank."""
    states: Mapping[str, Tensor] = saved.get("rng", {})
    rank, prefix = meeting.ranks.rank, _OF_RANK.format(meeting.ranks.rank)
    own = {n.removeprefix(prefix): t for n, t in states.items() if n.startswith(prefix)}
    if rank == 0:
        own = {name: state for name, state in states.items() if "/" not in name}
    elif states and not own:
        warnings.warn(
            f"the checkpoint has no random state of rank {rank}, because it was saved by fewer ranks: this rank goes "
            f"on with its own.",
            stacklevel=4,
        )
    return {**saved, "rng": own}
