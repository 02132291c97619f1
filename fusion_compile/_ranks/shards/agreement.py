"""What must be the same on all ranks before they go on: said to each other, and refused on all of them where it is not.

Without this a rank with another learning rate would train other weights, and one whose parameter has no gradient would
wait for the others until a timeout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def agree(
    group: Any, said: Mapping[str, str], device: torch.device, flags: Sequence[bool], *, remedy: str
) -> list[bool]:
    """Which of `flags` are set on any rank of `group`, once all say the same.

    Args:
        group: A process group; all of its ranks call this at the same time.
        said: By subject, in words, what must be the same; every rank has the same subjects.
        device: Where the tensors lie that ranks send each other.
        flags: What may differ; as many on all ranks.
        remedy: What to do, for the message.

    Raises:
        RuntimeError: On all ranks, with what each of the first two that differ says.
    """
    mine = torch.tensor([*map(_digest, said.values()), *map(int, flags)], dtype=torch.int64, device=device)
    heard = of_all_ranks(group, mine).tolist()
    ranks = len(heard)
    subjects = len(said)
    if all(row[:subjects] == heard[0][:subjects] for row in heard):
        return [any(of_ranks) for of_ranks in zip(*(row[subjects:] for row in heard), strict=True)]
    everybody: list[Any] = [None] * ranks
    dist.all_gather_object(everybody, dict(said), group=group)
    members = dist.get_process_group_ranks(group)
    for subject, first in everybody[0].items():
        for at, other in enumerate(everybody):
            if other.get(subject) != first:
                raise RuntimeError(
                    f"ranks differ in {subject}: {_differing(first, other.get(subject, 'nothing'), members[0])}, "
                    f"{_differing(other.get(subject, 'nothing'), first, members[at])}. Nothing was changed. {remedy}"
                )
    raise RuntimeError(f"ranks differ in what they optimize. Nothing was changed. {remedy}")


def of_all_ranks(group: Any, own: Tensor) -> Tensor:
    """``[n]`` of each rank -> ``[ranks, n]``."""
    rows = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(rows, own, group=group)
    return rows.view(-1, len(own))


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _differing(own: str, other: str, rank: int) -> str:
    """The entries of `own`, which are separated by ``;``, that `other` lacks."""
    theirs = set(other.split("; "))
    differing = [entry for entry in own.split("; ") if entry not in theirs]
    shown = "; ".join(differing[:3]) + ("; …" if len(differing) > 3 else "")
    return f"rank {rank} has {shown or 'no such entry'}"
