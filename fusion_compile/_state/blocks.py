"""Cut fused matrices (q, k and v, or gate and up) into blocks that are updated as matrices of their own (CMuon)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from torch import nn

from fusion_compile._state.routing import ELEMENTWISE_RECIPE, SPECTRAL_MIN_SIDE, Route, check_patterns
from fusion_compile.optim._transform import SPECTRAL, Blocks

BlockSpec: TypeAlias = int | tuple[int, ...] | tuple[str, int | tuple[int, ...]]
"""Blocks of one matrix: a number of equal row blocks, the rows of each block, or ``("columns", either)``."""
SplitBlocks: TypeAlias = Mapping[str, BlockSpec] | str | None
"""Blocks by regular expression, ``"auto"``, or None for whole matrices."""

# Three equal parts in q, k, v order. Not query_key_value, whose rows go head by head.
_QKV_NAME = re.compile(r"(^|_)(qkv|qkv_proj|wqkv|in_proj_weight|c_attn)$", re.IGNORECASE)
_TWO_NAME = re.compile(r"(^|_)(kv|kv_proj|wkv|gate_up|gate_up_proj|w12)$", re.IGNORECASE)
_ADALN_NAME = re.compile(r"(^|\.)adaln_mod(ulation)?\.", re.IGNORECASE)


def cut_blocks(routes: tuple[Route, ...], model: nn.Module, split_blocks: SplitBlocks) -> tuple[Route, ...]:
    """`routes` with the blocks of every spectral matrix that `split_blocks` selects (CMuon, 2608.02502).

    ``{r"\\.qkv\\.": 3, r"\\.wqkv\\.": (2048, 512, 512), r"\\.out\\.": ("columns", 8)}`` gives by regular expression k
    equal blocks of rows, blocks of these rows (grouped queries), or the same of columns. Blocks that do not fit, or
    that have a side under 128, are a ValueError. ``"auto"`` recognizes fused matrices by name: q, k and v in three
    equal parts, k and v or gate and up in two, an adaLN projection by its width. Where it recognizes a matrix and
    cannot cut it, the reason says so. The order of the rows cannot be seen: name the matrices that your attention
    interleaves.
    """
    if split_blocks is None:
        return routes
    if isinstance(split_blocks, str):
        if split_blocks != "auto":
            raise ValueError(
                f"split_blocks={split_blocks!r} is not known; give 'auto' or {{regular expression: blocks}}."
            )
        modules = dict(model.named_modules(remove_duplicate=False))
        return tuple(_cut_by_name(r, modules) if r.role == SPECTRAL else r for r in routes)
    if not isinstance(split_blocks, Mapping):
        raise TypeError(
            f"split_blocks is a {type(split_blocks).__name__}; give 'auto' or {{regular expression: blocks}}."
        )
    return _cut_by_pattern(routes, split_blocks)


def _cut_by_pattern(routes: tuple[Route, ...], split_blocks: Mapping[str, BlockSpec]) -> tuple[Route, ...]:
    if split_blocks and all(r.reason == ELEMENTWISE_RECIPE for r in routes):
        raise ValueError(
            f"split_blocks={dict(split_blocks)} has no effect: the optimizer updates every parameter element by "
            f"element; drop it, or use one with a spectral part (muon, normuon, sf_normuon)."
        )
    check_patterns("split_blocks", tuple(split_blocks), [r.name for r in routes])
    matrices = [r for r in routes if r.role == SPECTRAL]
    for pattern in split_blocks:
        if not any(re.search(pattern, r.name) for r in matrices):
            other = next(r for r in routes if re.search(pattern, r.name))
            raise ValueError(
                f"split_blocks: {pattern!r} matches no matrix on the spectral path; {other.name} {list(other.shape)} "
                f"is updated element by element ({other.reason})."
            )

    def cut_one(r: Route) -> Route:
        patterns = [p for p in split_blocks if re.search(p, r.name)]
        if r.role != SPECTRAL or not patterns:
            return r
        if any(split_blocks[p] != split_blocks[patterns[0]] for p in patterns):
            raise ValueError(f"split_blocks: {r.name} matches {' and '.join(map(repr, patterns))}; keep one.")
        blocks = _read(split_blocks[patterns[0]], r, patterns[0])
        if blocks is not None and (short := _shortest(r, blocks)) < SPECTRAL_MIN_SIDE:
            raise ValueError(
                f"split_blocks {patterns[0]!r}: {r.name} {list(r.shape)} {_in_words(blocks)} has a block with a side "
                f"of {short}; a block needs at least {SPECTRAL_MIN_SIDE}. Cut it into fewer."
            )
        return _with_blocks(r, blocks)

    return tuple(map(cut_one, routes))


def _read(spec: Any, r: Route, pattern: str) -> Blocks | None:
    """Read an entry of `split_blocks` for one matrix; None for a single block."""
    axis, sizes = -2, spec
    if isinstance(spec, Sequence) and len(spec) == 2 and spec[0] in ("rows", "columns"):
        axis, sizes = (-2 if spec[0] == "rows" else -1), spec[1]
    side, unit = r.matrix[axis], "rows" if axis == -2 else "columns"
    count = [sizes] if isinstance(sizes, int) else sizes
    if not isinstance(count, list | tuple) or not count or not all(type(s) is int and s > 0 for s in count):
        raise ValueError(
            f"split_blocks {pattern!r}: {spec!r} is neither a number of blocks nor a tuple of their sizes; give 3, "
            f"(2048, 512, 512) or ('columns', 3)."
        )
    if isinstance(sizes, int):
        if side % sizes:
            raise ValueError(f"split_blocks {pattern!r}: the {side} {unit} of {r.name} are not {sizes} equal blocks.")
        return _equal(side, sizes, axis)
    if sum(sizes) != side:
        raise ValueError(
            f"split_blocks {pattern!r}: {'+'.join(map(str, sizes))} is {sum(sizes)}, but {r.name} has {side} {unit}."
        )
    return Blocks(tuple(sizes), axis) if len(sizes) > 1 else None


def _cut_by_name(r: Route, modules: Mapping[str, nn.Module]) -> Route:
    """Cut by the parameter's name and by the class of the module around its layer."""
    rows, columns = r.matrix
    layer_path = r.name.removesuffix(".weight")
    around, _, layer = layer_path.rpartition(".")
    kind = type(modules.get(around)).__name__
    if _QKV_NAME.search(layer):
        if columns == 3 * rows and layer == "c_attn":  # transformers' Conv1D keeps its weight transposed
            blocks = _equal(columns, 3, -1)
        elif rows == 3 * columns:
            blocks = _equal(rows, 3)
        else:
            return replace(r, reason=f"{r.reason}; q, k and v of unknown sizes, not cut: name them in split_blocks")
    elif _TWO_NAME.search(layer) or (layer == "proj" and kind.lower().endswith("glu")):
        if rows % 2:
            return r
        blocks = _equal(rows, 2)
    elif _ADALN_NAME.search(f"{layer_path}.") or (layer == "linear" and kind.startswith("AdaLayerNorm")):
        if rows % columns:
            return r
        blocks = _equal(rows, rows // columns)
    else:
        return r
    if blocks is not None and _shortest(r, blocks) < SPECTRAL_MIN_SIDE:
        return replace(r, reason=f"{r.reason}; not {_in_words(blocks)}: a side under {SPECTRAL_MIN_SIDE}")
    return _with_blocks(r, blocks)


def _equal(side: int, count: int, axis: int = -2) -> Blocks | None:
    return Blocks((side // count,) * count, axis) if count > 1 else None


def _shortest(r: Route, blocks: Blocks) -> int:
    return min(*blocks.sizes, r.matrix[1] if blocks.axis == -2 else r.matrix[0])


def _with_blocks(r: Route, blocks: Blocks | None) -> Route:
    return r if blocks is None else replace(r, blocks=blocks, reason=f"{r.reason} {_in_words(blocks)}")


def _in_words(blocks: Blocks) -> str:
    unit = "row" if blocks.axis == -2 else "column"
    if len(set(blocks.sizes)) == 1:
        return f"in {len(blocks.sizes)} {unit} blocks of {blocks.sizes[0]}"
    return f"in {unit} blocks of {'+'.join(map(str, blocks.sizes))}"
