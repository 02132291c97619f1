"""Matrices made of several blocks (q, k and v in one weight): apply a function to each block by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeAlias

import torch
from torch import Tensor

BlockSizes: TypeAlias = tuple[tuple[int, ...], int]
"""Sizes along an axis, and the axis: -2 for rows, -1 for columns."""


def in_blocks(fn: Callable[..., tuple[Tensor, ...]], blocks: BlockSizes | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """``fn(*tensors)`` on every block of each ``[..., m, n]``; the results are put back along the same axis.

    All blocks of one size come in one call, as ``[..., j, m_b, n]`` (columns: ``[..., j, m, n_b]``). So `fn` is written
    for ``[..., m, n]`` and is called once for each size, however many matrices the leading dimensions hold.
    If the axis of a tensor counts blocks instead of rows or columns, it is cut into ones. Neighbours of one size are a
    view (rows without any copy); other blocks are concatenated. `blocks` None: ``fn(*tensors)``.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> in_blocks(lambda b: (b / b.sum(-2, keepdim=True),), ((2, 1), -2), x)[0].flatten().tolist()
        [0.3333333432674408, 0.6666666865348816, 1.0]
    """
    if blocks is None:
        return fn(*tensors)
    sizes, axis = blocks
    runs = _runs(sizes)
    results: dict[int, tuple[Tensor, ...]] = {}
    for size in dict.fromkeys(size for size, _, _ in runs):
        mine = [i for i, run in enumerate(runs) if run[0] == size]
        given = [torch.cat(cut, -3) if len(cut) > 1 else cut[0] for cut in (_cut(t, blocks, mine) for t in tensors)]
        counts = [runs[i][2] for i in mine]
        parts = [torch.split(out, counts, -3) if len(mine) > 1 else (out,) for out in fn(*given)]
        results |= dict(zip(mine, zip(*parts, strict=True), strict=True))
    whole = (
        [_join(part, axis) for part in parts] for parts in zip(*(results[i] for i in range(len(runs))), strict=True)
    )
    return tuple(torch.cat(parts, axis) if len(parts) > 1 else parts[0] for parts in whole)


def _runs(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """``(size, first block, how many)`` of neighbours of one size."""
    runs, at = [], 0
    for size, same in groupby(sizes):
        count = len(list(same))
        runs.append((size, at, count))
        at += count
    return runs


def _cut(tensor: Tensor, blocks: BlockSizes, which: Sequence[int]) -> list[Tensor]:
    """The runs `which` of the axis as views, with a new dimension for the blocks before the matrix."""
    sizes, axis = blocks
    length = tensor.shape[axis]
    if length not in (sum(sizes), len(sizes)):
        raise ValueError(
            f"blocks of {'+'.join(map(str, sizes))} do not divide {tuple(tensor.shape)} along axis {axis}."
        )
    here = sizes if length == sum(sizes) else (1,) * len(sizes)
    views = []
    for _, first, count in (_runs(sizes)[i] for i in which):
        size = here[first]
        view = torch.unflatten(tensor.narrow(axis, sum(here[:first]), count * size), axis, (count, size))
        views.append(view if axis == -2 else view.movedim(-2, -3))
    return views


def _join(blocked: Tensor, axis: int) -> Tensor:
    """The inverse of one view of `_cut`."""
    return (blocked if axis == -2 else blocked.movedim(-3, -2)).flatten(axis - 1, axis)
