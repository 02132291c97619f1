"""Module <-> banks. The only room that knows parameter names and where each parameter lies.

Parameters of one role, shape and dtype form one bank: matrices on the spectral path are stacked ``[K, m, n]``; all that
is updated element by element lies in one flat vector per dtype, each parameter 16-byte aligned. Every other state
tensor of an optimizer (moments, z) has the form of a bank, or of one with smaller trailing dimensions, or is a 0-dim
number; so one `Layout` translates all of it to and from full parameter names.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._routing import Route
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import BankFacts, Blocks, Facts, Member

_ALIGNMENT = 16


@dataclass(frozen=True)
class Place:
    """Where one parameter lies: index `at` of a stacked bank, or offset `at` of a flat one."""

    name: str
    shape: tuple[int, ...]
    at: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Bank:
    """One tensor that holds many parameters. `matrix`: ``(m, n)`` of a stacked bank, None for a flat one.

    `dtype`: of the module's parameters. `length`: entries of a flat bank, or matrices of a stacked one. `blocks`: what
    every matrix is cut into for its update.
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

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`tensor` (shaped like the bank, trailing dimensions free) as one view a place, in that part's shape."""
        if self.matrix is not None:
            parts = list(tensor.unbind(0))
            whole = tuple(tensor.shape[1:]) == self.matrix
            return [part.view(p.shape) if whole else part for part, p in zip(parts, self.places, strict=True)]
        ends = [p.at for p in self.places[1:]] + [self.length]
        sizes = [end - p.at for p, end in zip(self.places, ends, strict=True)]
        padded = torch.split(tensor, sizes)
        return [part[: p.numel].view(p.shape) for part, p in zip(padded, self.places, strict=True)]

    def join(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The inverse of `split`: one new tensor of the bank's shape; padding is zero."""
        if self.matrix is not None:
            rows, columns = self.matrix
            return torch.stack([part.reshape(rows, columns) for part in parts]).to(dtype)
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
    def facts(self) -> Facts:
        """By bank key, what a transform may know of it."""
        return {b.key: BankFacts(tuple(Member(p.name, p.shape, p.at) for p in b.places), b.blocks) for b in self.banks}

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


def build_layout(model: nn.Module, routes: Sequence[Route]) -> Layout:
    """Group the routed parameters into banks. Raises ValueError for what a bank cannot hold, with the full name."""
    parameters = dict(model.named_parameters())
    devices = {parameters[r.name].device for r in routes}
    if not routes:
        raise ValueError("the model has no trainable parameter; set requires_grad=True on what should be trained.")
    if len(devices) > 1:
        raise ValueError(
            f"the model's trainable parameters lie on {', '.join(sorted(map(str, devices)))}; move them to one device."
        )
    groups: dict[tuple[str, torch.dtype, tuple[int, int] | None, Blocks | None], list[tuple[str, Tensor]]] = {}
    for r in routes:
        p = parameters[r.name]
        if not p.dtype.is_floating_point or p.layout is not torch.strided or type(p.data) is not Tensor:
            kind = f"{p.layout} {p.dtype}".replace("torch.strided ", "") + f" {type(p.data).__name__}"
            raise ValueError(
                f"{r.name} {list(p.shape)} is a {kind}; a bank holds dense floating-point tensors. "
                f"Freeze it (requires_grad=False) or convert it."
            )
        matrix = (p.shape[0], p.numel() // p.shape[0]) if r.role == "spectral" else None
        groups.setdefault((r.role, p.dtype, matrix, r.blocks), []).append((r.name, p))
    return Layout(tuple(_bank(*key, members) for key, members in groups.items()), devices.pop())


def _bank(
    role: str,
    dtype: torch.dtype,
    matrix: tuple[int, int] | None,
    blocks: Blocks | None,
    members: list[tuple[str, Tensor]],
) -> Bank:
    name = str(dtype).removeprefix("torch.")
    if matrix is not None:
        places = tuple(Place(n, tuple(p.shape), i) for i, (n, p) in enumerate(members))
        parts = [role, f"{matrix[0]}x{matrix[1]}", name]
        if blocks is not None:
            parts.insert(2, ("rows" if blocks.axis == -2 else "columns") + "+".join(map(str, blocks.sizes)))
        return Bank("/".join(parts), dtype, matrix, places, len(members), blocks)
    step = max(1, _ALIGNMENT // dtype.itemsize)
    flat, at = [], 0
    for n, p in members:
        flat.append(Place(n, tuple(p.shape), at))
        at += -(-p.numel() // step) * step
    return Bank(f"{role}/{name}", dtype, None, tuple(flat), at)


class Residence:
    """The module's parameters as views into banks, and the check that they still are.

    Taking up residence copies every parameter into a bank and points ``parameter.data`` at its place there: the
    `Parameter` objects stay the same, so optimizers, EMA copies and hooks that hold them keep working. Each view has a
    storage of its own over its part of the bank's memory: what is written to a file or a pipe by storage
    (``torch.save`` of one layer, ``pickle``) is then that part and not the whole bank.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.layout = layout
        self._model = model
        parameters = dict(model.named_parameters())
        self.banks: Tensors = layout.join({n: p.detach() for n, p in parameters.items()}, in_state_dtype=False)
        owners = {id(p): [] for p in parameters.values()}  # type: dict[int, list[tuple[dict[str, Any], str, str]]]
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, p in module._parameters.items():
                if p is not None and id(p) in owners:
                    owners[id(p)].append((module._parameters, key, f"{prefix}.{key}" if prefix else key))
        self._tenants = []
        self._places: list[Tensor] = []
        self._buffers: list[tuple[dict[str, Any], str, str, Tensor]] = []
        for name, view in layout.views(self.banks).items():
            p, place = parameters[name], torch.from_dlpack(view)  # type: ignore[attr-defined]
            p.data = place
            self._places.append(p)
            self._tenants += [(o, key, full, p, place) for o, key, full in owners[id(p)]]

    def move_out(self) -> None:
        """Give every parameter memory of its own again; the banks then belong to nobody but this object."""
        for parameter in self._places:
            parameter.data = parameter.data.clone()

    def keep_buffers(self, names: Sequence[str]) -> Tensors:
        """The module's buffers `names`, which the program writes; from now on `check` keeps them in the module."""
        kept: Tensors = {}
        for name in names:
            prefix, _, key = name.rpartition(".")
            owner = self._model.get_submodule(prefix)._buffers
            kept[name] = owner[key]  # type: ignore[assignment]
            self._buffers.append((owner, key, name, kept[name]))
        return kept

    def say_written(self) -> None:
        """Bump the version of every parameter: the program writes the banks, whose versions the views do not share, and
        autograd and caches of values computed from weights must notice."""
        torch.autograd.graph.increment_version(self._places)

    def check(self) -> None:
        """Raise RuntimeError naming the first parameter that was replaced, moved, rebound or frozen since the banks
        were built. A buffer that was assigned anew (as a forward outside the step may) is copied back to its place."""
        for owner, key, name, parameter, place in self._tenants:
            if owner.get(key) is not parameter:
                raise RuntimeError(
                    f"{name} {list(parameter.shape)} was replaced by another tensor after compile_training_step(); the "
                    f"compiled program still updates the old one. Copy into it (parameter.copy_) or compile the step "
                    f"again."
                )
            if not parameter.is_set_to(place):
                raise RuntimeError(
                    f"{name} {list(place.shape)} was rebound (.data = …, .to(), .half()) after "
                    f"compile_training_step(); the compiled program still updates the old memory. Copy into it "
                    f"(parameter.copy_) or compile the step again."
                )
            if not parameter.requires_grad:
                raise RuntimeError(
                    f"{name} {list(parameter.shape)} was frozen (requires_grad=False) after compile_training_step(); "
                    f"the compiled program still updates it. Unfreeze it or compile the step again."
                )
        for owner, key, name, kept in self._buffers:
            now = owner.get(key)
            if now is kept:
                continue
            if now is None or (now.shape, now.dtype, now.device) != (kept.shape, kept.dtype, kept.device):
                what = "removed" if now is None else f"replaced by {now.dtype} {list(now.shape)} on {now.device}"
                raise RuntimeError(
                    f"buffer {name} was {what} after compile_training_step(); the compiled program updates "
                    f"{kept.dtype} {list(kept.shape)} on {kept.device}. Put that back or compile the step again."
                )
            with torch.no_grad():
                kept.copy_(now)
            owner[key] = kept
