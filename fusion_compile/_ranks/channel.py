"""What ranks tell each other on the host, before anything runs on a device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fusion_compile._ranks._compat import group_among, name_of, store, timeout_of
from fusion_compile._ranks.groups import Ranks

FAKE = "fake"
"""The backend of torch's own tests, in which one process plays one rank of many, and hears nobody."""


class Channel:
    """A gloo group of its own for the ranks of a step, so that no message meets a collective of the user's.

    All ranks make it together. It waits as long as the mesh's group does (``init_process_group(timeout=)``).
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._group: Any = None
        self._second: Any = None
        if ranks.backend != FAKE:
            self._group = self._made()

    def _made(self) -> Any:
        return group_among(list(self._ranks.everyone.members), "gloo", timeout_of(self._ranks.device_type))

    @property
    def rank(self) -> int:
        return self._ranks.rank

    def all_say(self, numbers: Sequence[int], own: int = 0) -> tuple[bool, int]:
        """Whether every rank gives the same `numbers` (below 2⁶²), and the greatest `own`. One small message; no rank
        goes on alone."""
        if self._group is None:
            return True, own
        said = torch.tensor([own, *numbers, *(-n for n in numbers)], dtype=torch.int64)
        dist.all_reduce(said, dist.ReduceOp.MAX, self._group)
        greatest, *rest = said.tolist()
        most, least = rest[: len(numbers)], rest[len(numbers) :]
        return all(a == -b for a, b in zip(most, least, strict=True)), greatest

    def everyone_says(self, said: Any) -> list[Any]:
        """What each rank says, in their order. `said`: anything that pickles."""
        if self._group is None:
            return [said] * self._ranks.world
        heard: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(heard, said, self._group)
        return heard

    def group(self, *, beside: bool) -> Any:
        """The group, None where nobody is heard. `beside`: another one, for a thread of its own, which all ranks make
        together when they first ask for it."""
        if beside and self._group is not None and self._second is None:
            self._second = self._made()
        return self._second if beside else self._group

    def leave_word(self, meeting: int, said: str) -> str:
        """Leave to the others why this rank goes no further after so many meetings, unless another has left word
        before: what that was, or nothing. It waits for nobody; the word lies where the ranks found each other."""
        found, own = store(), f"rank {self.rank}: {said}"
        if found is None or self._group is None:
            return ""
        try:
            key = f"fusion_compile/failed/{name_of(self._group)}/{meeting}"
            first = str(found.compare_set(key, "", own).decode())
        except (RuntimeError, AttributeError):  # it lay with a rank that has ended
            return ""
        return "" if first == own else first

    def close(self) -> None:
        """Give the groups up."""
        self._group = self._second = None


def number_of(said: Any) -> int:
    """A number that stands for `said`, by what it shows: the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=7).digest(), "big")
