"""Batch shapes: how many programs a step may have, and bands of sizes that one symbolic program serves."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from fusion_compile._step import batches

MAX_PROGRAMS = 8
"""Programs of one batch shape that differ in what a plain number decides, and the default bound on batch shapes."""

_ANY = "any size"

Dims: TypeAlias = tuple[tuple[int, ...], ...]
"""For each tensor of a batch, in order, its axes whose size may be another one."""


class Band(NamedTuple):
    """Batches of which one program serves every size.

    Attributes:
        signature: That of its batches, with a mark in the place of the sizes that vary.
        dims: Where these are.
    """

    signature: batches.Signature
    dims: Dims


def refuse_too_many(
    signature: batches.Signature, known: Collection[batches.Signature], bound: int, *, of_this_shape: int
) -> None:
    """Raise ValueError for a shape or a program beyond the bound. `of_this_shape`: programs that it has already."""
    batches.check_same_kind(signature, known)
    if len({*known, signature}) > bound:
        raise ValueError(
            f"this would be batch shape number {bound + 1}: each shape is a program of its own, with its own memory. "
            f"Pad or bucket the batches, drop the last incomplete one (DataLoader(drop_last=True)), let one program "
            f"serve a band of sizes (dynamic=True), or raise the bound: compile_training_step(max_shapes=…)."
            f"{_of_constants(signature, known)}"
        )
    if of_this_shape >= MAX_PROGRAMS:
        raise ValueError(
            f"this would be program number {MAX_PROGRAMS + 1} for one batch shape: a plain number of the loss or the "
            f"batch decides what is computed, otherwise each time. Keep it in a 0-dim tensor, or take mode='eager'."
        )


def constant_sentence(signature: batches.Signature, known: Iterable[batches.Signature]) -> str:
    """What to say where a batch differs from one before it in a constant alone; empty where none does."""
    if not (path := _changed_constant(signature, known)):
        return ""
    return (
        f"{path} is another one than before, and each value of it has a program of its own (max_shapes bounds them). "
        f"Leave out of the batch what the loss does not read."
    )


def no_band_sentence(why: str, bound: int) -> str:
    """What to say where ``dynamic=True`` meets a step that is captured by running and has no bands. `why`."""
    return (
        f"dynamic=True serves no band of sizes here: the step is captured by running, and {why}. So each shape has a "
        f"program of its own, at most {bound} (max_shapes)."
    )


def _changed_constant(signature: batches.Signature, known: Iterable[batches.Signature]) -> str:
    """The first path whose value alone, which is no tensor, differs between `signature` and a known one."""
    for other in known:
        if [path for path, _ in signature] == [path for path, _ in other]:
            odd = [(path, a, b) for (path, a), (_, b) in zip(signature, other, strict=True) if a != b]
            if odd and not any(type(a) is tuple or type(b) is tuple for _, a, b in odd):
                return odd[0][0]
    return ""


def _of_constants(signature: batches.Signature, known: Iterable[batches.Signature]) -> str:
    path = _changed_constant(signature, known)
    return f" Each value of {path} counts as a shape, too." if path else ""


class Bands:
    """The bands of one step, and which shapes they serve. `dynamic`: whether there shall be any."""

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        self._bands: list[Band] = []
        self._served: set[batches.Signature] = set()
        self._outside: set[batches.Signature] = set()

    def key_of(self, signature: batches.Signature) -> batches.Signature:
        """The signature under which a batch's program is kept: the band's, or its own."""
        if not self._bands or signature in self._outside:
            return signature
        return next((band.signature for band in self._bands if _fits(band, signature)), signature)

    def opened_by(self, signature: batches.Signature, known: Iterable[batches.Signature]) -> Band | None:
        """The band that a new shape makes with one before it: they differ in sizes of contiguous tensors.

        A size of 0 or 1 is one number to torch, and makes none.
        """
        if self._dynamic and signature not in self._outside:
            for other in known:
                dims = _differing(signature, other)
                if dims is not None and any(dims) and min(_sizes(signature, dims)) > 1:
                    return Band(_marked(signature, dims), dims)
        return None

    def open(self, band: Band, signature: batches.Signature) -> None:
        """A program serves the band from now on, as it did for `signature`."""
        self._bands.append(band)
        self._served.add(signature)

    def serve(self, signature: batches.Signature) -> None:
        """A program of a band, or of this shape alone, has taken a step on this shape."""
        if self._bands:
            self._served.add(signature)

    def gives_up(self, signature: batches.Signature) -> bool:
        """Whether a shape that a band's program refused needs one of its own: if that program never served it."""
        if signature in self._served or self.key_of(signature) == signature:
            return False
        self._outside.add(signature)
        return True

    def forget(self) -> None:
        """There is no program any more."""
        self._bands.clear()
        self._served.clear()
        self._outside.clear()


def _fits(band: Band, signature: batches.Signature) -> bool:
    """Whether a batch of this signature belongs to the band, as far as its metadata says."""
    return len(_tensors(signature)) == len(band.dims) and _marked(signature, band.dims) == band.signature


def _tensors(signature: batches.Signature) -> list[tuple[Any, ...]]:
    return [what for _, what in signature if type(what) is tuple]


def _differing(one: batches.Signature, other: batches.Signature) -> Dims | None:
    if [path for path, _ in one] != [path for path, _ in other]:
        return None
    dims = []
    for (_, a), (_, b) in zip(one, other, strict=True):
        if type(a) is not tuple or type(b) is not tuple:
            if a != b:
                return None
            continue
        if len(a[0]) != len(b[0]) or a[1] != b[1] or a[3] is not None or b[3] is not None:
            return None  # what is one tensor in two places has one program for its sizes
        found = tuple(i for i, (m, n) in enumerate(zip(a[0], b[0], strict=True)) if m != n)
        if found and not (_is_contiguous(a) and _is_contiguous(b)):
            return None
        if not found and a != b:
            return None
        dims.append(found)
    return tuple(dims)


def _marked(signature: batches.Signature, dims: Dims) -> batches.Signature:
    following = iter(dims)
    return tuple((path, _mark(what, next(following)) if type(what) is tuple else what) for path, what in signature)


def _sizes(signature: batches.Signature, dims: Dims) -> list[int]:
    return [what[0][axis] for what, axes in zip(_tensors(signature), dims, strict=True) for axis in axes]


def _mark(what: tuple[Any, ...], dims: tuple[int, ...]) -> tuple[Any, ...]:
    shape, dtype, stride, same_as = what
    if not dims:
        return what
    marked = tuple(_ANY if i in dims else size for i, size in enumerate(shape))
    return marked, dtype, "contiguous" if _is_contiguous(what) else stride, same_as


def _is_contiguous(what: tuple[Any, ...]) -> bool:
    shape, _, stride, _ = what
    expected, step = [], 1
    for size in reversed(shape):
        expected.append(step)
        step *= size
    return all(size == 1 or a == b for size, a, b in zip(shape, stride, reversed(expected), strict=True))


def marks(batch: tuple[Any, ...], dims: Dims) -> list[tuple[Tensor, int]]:
    """``(tensor, axis)`` of every size of `batch` that a program is to be symbolic in."""
    return [(t, axis) for t, axes in zip(batches.tensors(batch), dims, strict=True) for axis in axes]
