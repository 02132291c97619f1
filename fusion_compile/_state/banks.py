"""Module <-> banks. The only room that knows parameter names and where each parameter lies.

Parameters of one role, shape, dtype and group form one bank. Matrices on the spectral path are stacked ``[K, m, n]``;
a parameter that is itself a stack ``[E, m, n]`` has E places in a row.
Parameters that are updated element by element share one flat vector per dtype and group, each 16-byte aligned. Every
other state tensor of an optimizer (moments, z) has the form of a bank, possibly with smaller trailing dimensions, or is
a 0-dim number. One `Layout` therefore translates all of it to and from full parameter names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile._state.routing import Route
from fusion_compile._types import Tensors
from fusion_compile.optim._grouped import in_group
from fusion_compile.optim._transform import ELEMENTWISE, BankInfo, BankInfos, Blocks, Place

_ALIGNMENT = 16


@dataclass(frozen=True)
class Bank:
    """One tensor that holds many parameters. `matrix`: ``(m, n)`` of a stacked bank, None for a flat one.

    `key`: unique, ``<role>/…/<dtype>``, for a named group with ``@<group>`` behind it. `dtype`: of the module's
    parameters. `length`: entries of a flat bank, or matrices of a stacked one. `blocks`: how every matrix is cut for
    its update.
    """

    key: str
    dtype: torch.dtype
    matrix: tuple[int, int] | None
    places: tuple[Place, ...]
    length: int
    blocks: Blocks | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.length,) if self.matrix is None else (self.length, *self.matrix)

    @property
    def matrices(self) -> list[int]:
        """How many matrices of a stacked bank each parameter has: E for a stack ``[E, m, n]``, otherwise 1."""
        rows, columns = self.matrix or (1, 1)
        return [max(1, place.numel // (rows * columns)) for place in self.places]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` (shaped like the bank, trailing dimensions free) as one view a place, in that part's shape.

        Of a flat bank it may have one number for every so many entries, a divisor of all places.
        """
        if self.matrix is not None:
            parts, counts = list(tensor.unbind(0)), self.matrices
            if len(parts) != len(counts):
                parts = [
                    part[0] if one == 1 else part for part, one in zip(torch.split(tensor, counts), counts, strict=True)
                ]
            whole = tuple(tensor.shape[1:]) == self.matrix
            return [_shaped(part, p) if whole else part for part, p in zip(parts, self.places, strict=True)]
        ends = [p.at for p in self.places[1:]] + [self.length]
        each = self.length // max(1, tensor.shape[0])
        sizes = [(end - p.at) // each for p, end in zip(self.places, ends, strict=True)]
        padded = torch.split(tensor, sizes)
        if each > 1:  # a scale for so many entries, or several codes in one number
            return [part[: -(-p.numel // each)] for part, p in zip(padded, self.places, strict=True)]
        return [_shaped(part[: p.numel], p) for part, p in zip(padded, self.places, strict=True)]

    @staticmethod
    def shaped(part: Tensor, place: Place) -> Tensor:
        """A contiguous part of a bank in the shape of the parameter at `place`, a view."""
        return _shaped(part, place)

    def placed(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """The matrices ``[m, n]`` of a stacked bank, one by one, as one tensor a place, in that part's shape."""
        found, at = [], 0
        for place, count in zip(self.places, self.matrices, strict=True):
            part = matrices[at] if count == 1 else torch.stack([*matrices[at : at + count]])
            found.append(_shaped(part, place))
            at += count
        return found

    def join(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `split`: one new tensor of the bank's shape; padding is zero."""
        parts = [part.permute(p.order) if p.order else part for part, p in zip(parts, self.places, strict=True)]
        if self.matrix is not None:
            if len(self.places) == self.length:
                return torch.stack([part.reshape(self.matrix) for part in parts]).to(dtype)
            return torch.cat([part.reshape(-1, *self.matrix) for part in parts]).to(dtype).contiguous()
        pieces: list[Tensor] = []
        ends = [p.at for p in self.places[1:]] + [self.length]
        for part, place, end in zip(parts, self.places, ends, strict=True):
            pieces.append(part.reshape(-1).to(dtype))
            if padding := end - place.at - place.numel:
                pieces.append(part.new_zeros(padding, dtype=dtype))
        return torch.cat(pieces)


@dataclass(frozen=True)
class Layout:
    """All banks of a model, and how to go from names to banks and back."""

    banks: tuple[Bank, ...]
    device: torch.device

    @property
    def state_dtype(self) -> torch.dtype:
        """dtype in which all updates are computed and kept: fp32, or fp64 as soon as one parameter is fp64."""
        dtype = torch.float32
        for bank in self.banks:
            dtype = torch.promote_types(dtype, bank.dtype)
        return dtype

    @property
    def infos(self) -> BankInfos:
        """By bank key, what a transform may know of it. Every matrix of a stack is a parameter of its own there."""
        return {b.key: BankInfo(tuple(_each_matrix(b)), b.blocks) for b in self.banks}

    def without_data(self) -> Tensors:
        """The banks in the state dtype as tensors on the meta device, to run a transform on."""
        return {b.key: torch.empty(b.shape, dtype=self.state_dtype, device="meta") for b in self.banks}

    def views(self, tensors: Tensors) -> Tensors:
        """Banks -> ``{full name: view}``."""
        return {p.name: v for b in self.banks for p, v in zip(b.places, b.split(tensors[b.key]), strict=True)}

    def join(self, named: Tensors, *, in_state_dtype: bool = True) -> Tensors:
        """``{full name: tensor}`` -> new banks."""
        return {
            b.key: b.join([named[p.name] for p in b.places], self.state_dtype if in_state_dtype else b.dtype)
            for b in self.banks
        }

    def by_name(self, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """One state tensor of bank `key` as ``(full name, view)`` pairs."""
        bank = next(b for b in self.banks if b.key == key)
        return zip((p.name for p in bank.places), bank.split(tensor), strict=True)

    def bank_of(self, path: str) -> str | None:
        """Key of the bank whose form the state tensor at `path` has; None for a plain number."""
        return next((b.key for b in self.banks if path.endswith(f"/{b.key}")), None)


def build_layout(
    model: nn.Module, routes: Sequence[Route], *, columns_in_memory_order: bool = False, alignment: int = 1
) -> Layout:
    """Group the routed parameters into banks. Raises ValueError for what a bank cannot hold, with the full name.

    A parameter keeps the order of its axes in memory (``channels_last``) where it is updated entry by entry, and with
    `columns_in_memory_order` where it is a matrix, whose columns are then permuted. `alignment`: in a flat bank every
    parameter starts at a multiple of so many entries.
    """
    parameters = dict(model.named_parameters())
    devices = {parameters[r.name].device for r in routes}
    if not routes:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on what should be trained.")
    if len(devices) > 1:
        raise ValueError(
            f"the model's trainable parameters lie on {', '.join(sorted(map(str, devices)))}; move them to one device."
        )
    members: dict[_Kind, list[Place]] = {}
    for r in routes:
        p = parameters[r.name]
        if not p.dtype.is_floating_point or p.layout is not torch.strided or type(p.data) is not Tensor:
            kind = f"{p.layout} {p.dtype}".replace("torch.strided ", "") + f" {type(p.data).__name__}"
            instead = "convert it"
            if p.is_complex():
                instead = "keep torch.view_as_real of it as the parameter, and use torch.view_as_complex in the forward"
            raise ValueError(
                f"{r.name} {list(p.shape)} is a {kind}; a bank holds dense floating-point tensors. "
                f"Freeze it (requires_grad=False), or {instead}."
            )
        matrix = None if r.role == ELEMENTWISE else r.matrix
        place = Place(r.name, tuple(p.shape), 0, _order_in_memory(p, r, columns_in_memory_order))
        members.setdefault(_Kind(r.role, p.dtype, matrix, r.blocks, r.group), []).append(place)
    return Layout(tuple(_bank(kind, named, alignment) for kind, named in members.items()), devices.pop())


class _Kind(NamedTuple):
    """What all parameters of one bank have in common."""

    role: str
    dtype: torch.dtype
    matrix: tuple[int, int] | None
    blocks: Blocks | None
    group: str

    @property
    def key(self) -> str:
        parts = [self.role]
        if self.matrix is not None:
            parts.append(f"{self.matrix[0]}x{self.matrix[1]}")
        if self.blocks is not None:
            sizes = "+".join(map(str, self.blocks.sizes))
            parts.append(f"rows{sizes}" if self.blocks.axis == -2 else f"columns{sizes}")
        parts.append(str(self.dtype).removeprefix("torch."))
        return in_group("/".join(parts), self.group)


def _bank(kind: _Kind, members: list[Place], alignment: int) -> Bank:
    places, at = [], 0
    if kind.matrix is not None:
        for place in members:
            places.append(place._replace(at=at))
            at += place.numel // (kind.matrix[0] * kind.matrix[1])
        return Bank(kind.key, kind.dtype, kind.matrix, tuple(places), at, kind.blocks)
    step = math.lcm(max(1, _ALIGNMENT // kind.dtype.itemsize), alignment)
    for place in members:
        places.append(place._replace(at=at))
        at += -(-place.numel // step) * step
    return Bank(kind.key, kind.dtype, None, tuple(places), at)


def _order_in_memory(p: Tensor, r: Route, columns: bool) -> tuple[int, ...]:
    """The axes of a parameter as they lie in memory, if a bank can keep them so; empty for those that lie in order.

    Element by element any order will do. The columns of a flattened convolution may be permuted, because every matrix
    transform treats them alike; rows, stacks and blocks of columns may not. `columns`: whether they may at all.
    """
    strides: Sequence[int] = p.stride()
    order = tuple(sorted(range(p.ndim), key=lambda axis: -strides[axis]))
    columns_alone = columns and order[:1] == (0,) and not r.stack and (r.blocks is None or r.blocks.axis == -2)
    keeps = order != tuple(range(p.ndim)) and (r.role == ELEMENTWISE or columns_alone)
    return order if keeps and p.permute(order).is_contiguous() else ()


def _shaped(part: Tensor, place: Place) -> Tensor:
    """A contiguous part of a bank in the parameter's shape, with its own order in memory."""
    if not place.order:
        return part.view(place.shape)
    return part.view([place.shape[axis] for axis in place.order]).permute(
        [place.order.index(axis) for axis in range(len(place.order))]
    )


def _each_matrix(bank: Bank) -> Iterator[Place]:
    """The places of a bank with those of a stack one by one, as ``experts.up[3]``."""
    for place, count in zip(bank.places, bank.matrices, strict=True):
        if bank.matrix is None or count == 1:
            yield place
        else:
            yield from (Place(f"{place.name}[{i}]", bank.matrix, place.at + i) for i in range(count))
