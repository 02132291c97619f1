"""Private torch API of sharded parameters: which part of a tensor lies where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.distributed.tensor import _utils

Part = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape of a part of a tensor, and the offsets at which it begins."""


def part_at(shape: Sequence[int], mesh: Any, coordinate: Sequence[int], placements: Sequence[Any]) -> Part:
    """The part of a tensor of `shape`, placed by `placements`, that lies at `coordinate` of the device mesh."""
    of: Any = _utils._compute_local_shape_and_global_offset
    part, at = of(tuple(shape), tuple(mesh.shape), list(coordinate), placements)
    return tuple(map(int, part)), tuple(map(int, at))
