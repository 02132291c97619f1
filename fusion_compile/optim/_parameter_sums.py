"""Sums over each parameter of a flat bank, without a loop over them and without atomics.

A flat bank ``[N]`` holds parameters of very different lengths. They are summed level by level: every range is cut into
pieces of at most `WIDTH` entries, each one row of a regular ``[P, WIDTH]`` sum, and the rows of one parameter are the
ranges of the next level. The order of addition is fixed, so results are bitwise reproducible, and the number of
nodes grows with the logarithm of the longest parameter only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._compat import mark_static
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import BankInfos, Place

WIDTH = 1024


class _Level(NamedTuple):
    """Rows to sum: ``[start, stop)`` of each, int64 ``[P]``; `width`: length of the longest."""

    start: Tensor
    stop: Tensor
    width: int


class _Tables(NamedTuple):
    levels: tuple[_Level, ...]
    entries: Tensor  # of each parameter, [M]
    owner: Tensor  # the parameter of every `block` entries, int32 [N / block]
    block: int


class ParameterSums:
    """The parameters of one flat bank. `prepare` builds the index tables on a device once: constants of the program,
    not state. They take 4 bytes for every `block` entries (16 bytes of parameters or more), and 16 for every
    `WIDTH`."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(sorted(places, key=lambda place: place.at))
        self._tables: dict[str, _Tables] = {}

    def prepare(self, bank: Tensor) -> None:
        """Build the tables for the device of `bank` ahead of the program that will read them, once: they keep their
        address, so that a CUDA graph reads them in place instead of copying them before every replay."""
        if str(bank.device) in self._tables:
            return
        tables = self._build(bank)
        if type(tables.owner) is type(bank) is Tensor:  # tensors of a trace hold no values
            self._tables[str(bank.device)] = tables
            for table in (tables.entries, tables.owner, *(t for level in tables.levels for t in level[:2])):
                mark_static(table)

    def sums(self, t: Tensor) -> Tensor:
        """``[N]`` -> ``[M]``: the sum of each parameter's entries."""
        for level in self._on(t).levels:
            at = level.start[:, None] + torch.arange(level.width, device=t.device)
            inside = at < level.stop[:, None]
            t = torch.where(inside, t[at.clamp(max=t.shape[0] - 1)], torch.zeros((), dtype=t.dtype, device=t.device))
            t = t.sum(-1)
        return t

    def count(self, t: Tensor) -> int:
        """How many entries of `t` belong to a parameter; the others are padding."""
        return sum([place.numel for place in self.places])

    def entries(self, t: Tensor) -> Tensor:
        """``[M]``: how many entries each parameter has, in the dtype of `t`."""
        return self._on(t).entries.to(t.dtype)

    def scale(self, t: Tensor, factors: Tensor) -> Tensor:
        """``[N]`` times the factor of the parameter that each entry belongs to (``[M]``)."""
        tables = self._on(t)
        return (t.view(-1, tables.block) * factors[tables.owner][:, None]).view(-1)

    def _on(self, t: Tensor) -> _Tables:
        tables = self._tables.get(str(t.device))
        return self._build(t) if tables is None else tables

    def _build(self, bank: Tensor) -> _Tables:
        def table(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=bank.device)

        starts = [place.at for place in self.places]
        entries = [place.numel for place in self.places]
        ranges = [(at, at + n) for at, n in zip(starts, entries, strict=True)]
        levels: list[_Level] = []
        while True:
            pieces: list[tuple[int, int]] = []
            rows: list[tuple[int, int]] = []
            for start, stop in ranges:
                cuts = range(start, max(stop, start + 1), WIDTH)
                rows.append((len(pieces), len(pieces) + len(cuts)))
                pieces += [(cut, min(cut + WIDTH, stop)) for cut in cuts]
            width = max(1, max(stop - start for start, stop in pieces))
            levels.append(_Level(table([a for a, _ in pieces]), table([b for _, b in pieces]), width))
            if len(pieces) == len(ranges):
                break
            ranges = rows
        block = math.gcd(bank.shape[0], *starts)
        firsts = torch.arange(0, bank.shape[0], block, device=bank.device)
        # Padding between two parameters goes with the first of them.
        owner = torch.bucketize(firsts, table(starts), out_int32=True, right=True) - 1
        return _Tables(tuple(levels), table(entries), owner, block)


class WholeTensors:
    """`ParameterSums` where every matrix (or the whole vector) is one parameter."""

    def sums(self, t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True).sum(-2, keepdim=True) if t.ndim > 1 else t.sum()

    def count(self, t: Tensor) -> int:
        return t.numel()

    def entries(self, t: Tensor) -> Tensor:
        n = t.shape[-1] * t.shape[-2] if t.ndim > 1 else t.numel()
        return torch.full((), n, dtype=t.dtype, device=t.device)

    def scale(self, t: Tensor, factors: Tensor) -> Tensor:
        return t * factors


WHOLE = WholeTensors()


def sums_by_bank(infos: BankInfos) -> dict[str, ParameterSums]:
    """`ParameterSums` for every bank whose parameters are known; only those of flat banks are used."""
    return {k: ParameterSums(info.places) for k, info in infos.items() if info.places}


def prepare_flat(sums: Mapping[str, ParameterSums], params: Tensors) -> None:
    """Build the tables of all flat banks of `params`."""
    for k, p in params.items():
        if k in sums and p.ndim == 1:
            sums[k].prepare(p)


def sums_for(sums: Mapping[str, ParameterSums], key: str, t: Tensor) -> ParameterSums | WholeTensors:
    """How to add up the parameters of bank `key`, of which `t` is one tensor."""
    return sums[key] if key in sums and t.ndim == 1 else WHOLE
