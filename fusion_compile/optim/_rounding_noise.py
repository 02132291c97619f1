"""Random numbers for rounding from a seed, a count, a parameter's name and an entry's place in it alone.

A counter-based hash: no generator, so the model's own stream is not moved, a resumed run draws what the other would
have drawn, and eager and compiled programs agree bit for bit. How parameters lie in banks does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._compat import mark_static
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import BankInfo, Place

_MASK = 0xFFFFFFFF
# Below 2³¹, so that a product with a number of 32 bits fits into int64: an overflow is undefined in C++.
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97


class Draw(NamedTuple):
    """What distinguishes one drawing from another: `seed` and `steps`, 0-dim int64, and `salt`, the field's name."""

    seed: Tensor
    steps: Tensor
    salt: str = ""


class _Flat(NamedTuple):
    """The parameters of a flat bank on one device. `owner`: the parameter of every `block` entries, int32."""

    owner: Tensor
    starts: Tensor
    names: Tensor
    block: int


class RoundingNoise:
    """The hash over all banks. `infos`: what is known of them; a bank that it lacks counts as one parameter.

    `prepare` builds the tables of flat banks once, as constants of the program: 4 bytes for every `block` entries.
    """

    def __init__(self, infos: Mapping[str, BankInfo]) -> None:
        self._infos = infos
        self._flat: dict[tuple[str, str], _Flat] = {}
        self._stacked: dict[tuple[str, str], Tensor] = {}

    def prepare(self, banks: Tensors) -> None:
        """Build the tables of `banks` ahead of the program that will read them, once: a CUDA graph reads them in place
        instead of copying them before every replay."""
        for key, bank in banks.items():
            if type(bank) is not Tensor:  # tensors of a trace hold no values
                continue
            at = (key, str(bank.device))
            if at in self._flat or at in self._stacked:
                continue  # at the address that a recorded program reads
            places, given = self._places(key, bank), self._given_names(key)
            if bank.ndim == 1:
                made = _flat(places, bank)
                made = self._flat[at] = made if given is None else made._replace(names=given)
                tables = [made.owner, made.starts, made.names]
            else:
                tables = [_names(places, bank.device) if given is None else given]
                self._stacked[at] = tables[0]
            for table in tables:
                mark_static(table)

    def draw(self, key: str, like: Tensor, draw: Draw) -> Tensor:
        """Whole numbers from 0 to 65,535, int64, for every entry of `like`, which has the form of bank `key`."""
        at = (key, str(like.device))
        if like.ndim == 1:
            flat = self._flat.get(at)
            flat = _flat(self._places(key, like), like) if flat is None else flat
            first, second = _keys(flat.names, draw)
            place = torch.arange(like.shape[0], device=like.device).view(-1, flat.block)
            owner = flat.owner.to(torch.int64)
            place = place - flat.starts[owner][:, None]
            return _hash(place, first[owner][:, None], second[owner][:, None]).view(-1)
        names = self._stacked.get(at)
        names = _names(self._places(key, like), like.device) if names is None else names
        shape = (-1, *[1] * (like.ndim - 1))
        first, second = (k.view(shape) for k in _keys(names, draw))
        place = torch.arange(math.prod(like.shape[1:]), device=like.device).view(like.shape[1:])
        return _hash(place, first, second)

    def _given_names(self, key: str) -> Tensor | None:
        info = self._infos.get(key)
        return None if info is None else info.names

    def _places(self, key: str, bank: Tensor) -> Sequence[Place]:
        info = self._infos.get(key)
        if info is not None and info.places:
            return info.places
        if bank.ndim == 1:
            return (Place(key, tuple(bank.shape), 0),)
        return [Place(f"{key}[{i}]", tuple(bank.shape[1:]), i) for i in range(bank.shape[0])]


def _flat(places: Sequence[Place], bank: Tensor) -> _Flat:
    ordered = sorted(places, key=lambda place: place.at)
    starts = torch.tensor([place.at for place in ordered], dtype=torch.int64, device=bank.device)
    block = math.gcd(bank.shape[0], *(place.at for place in ordered)) or 1
    firsts = torch.arange(0, bank.shape[0], block, device=bank.device)
    # Padding between two parameters goes with the first of them.
    owner = torch.bucketize(firsts, starts, out_int32=True, right=True) - 1
    return _Flat(owner, starts, _names(ordered, bank.device), block)


def _names(places: Sequence[Place], device: torch.device) -> Tensor:
    ordered = sorted(places, key=lambda place: place.at)
    return torch.tensor([number_of(place.name) for place in ordered], dtype=torch.int64, device=device)


def number_of(text: str) -> int:
    """FNV-1a: 32 bits of `text`, in plain Python, which a capture can follow."""
    found = 0x811C9DC5
    for letter in text:
        found = ((found ^ ord(letter)) * 0x01000193) & _MASK
    return found


def _keys(names: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Two keys of 32 bits for each parameter. With one, a later step could draw another parameter's numbers moved by
    some places."""
    salted = _mix((names + number_of(draw.salt)) & _MASK)
    first = _mix((salted + (draw.seed & _MASK)) & _MASK)
    first = _mix((first + (draw.steps & _MASK)) & _MASK)
    second = _mix(((salted ^ _FIRST) + (draw.steps & _MASK)) & _MASK)
    return first, _mix((second + (draw.seed & _MASK)) & _MASK)


def _mix(x: Tensor) -> Tensor:
    """A bijection of the numbers of 32 bits after which each bit of the result depends on all bits of `x`."""
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = ((x ^ (x >> 15)) * _SECOND) & _MASK
    return x ^ (x >> 15)


def _hash(place: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = (place + first) & _MASK
    x = ((x ^ (x >> 16)) * _FIRST) & _MASK
    x = (x + second) & _MASK
    x = ((x ^ (x >> 15)) * _SECOND) & _MASK
    return (x ^ (x >> 15)) >> 16
