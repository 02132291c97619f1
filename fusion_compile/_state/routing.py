"""Which parameter takes which path through the optimizer, and why."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import nn

from fusion_compile.optim._transform import Blocks

SPECTRAL_MIN_SIDE = 128
"""Matrices with a shorter side are updated element by element: Newton-Schulz gains nothing there."""

_HEAD_NAME = re.compile(
    r"(^|\.)(lm_head|head|heads|classifier|unembed|to_logits|fc_out|proj_out|final_layer\.linear|final_layer)\.weight$"
)
BlockSpec: TypeAlias = int | tuple[int, ...] | tuple[str, int | tuple[int, ...]]
"""How a matrix is cut: into so many blocks of rows, into blocks of these rows, or ``("columns", either)``."""
SplitBlocks: TypeAlias = Mapping[str, BlockSpec] | str | None
"""What `route` takes: a specification by regular expression, ``"auto"``, or None for whole matrices."""

# Three equal parts in q, k, v order. Not query_key_value, whose rows go head by head.
_QKV_NAME = re.compile(r"(^|_)(qkv|qkv_proj|wqkv|in_proj_weight|c_attn)$", re.IGNORECASE)
_TWO_NAME = re.compile(r"(^|_)(kv|kv_proj|wkv|gate_up|gate_up_proj|w12)$", re.IGNORECASE)
_ADALN_NAME = re.compile(r"(^|\.)adaln_mod(ulation)?\.", re.IGNORECASE)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Route:
    """One parameter's role (``"spectral"`` or ``"scalar"``), the reason in words, and the blocks that its matrix is cut
    into (None: it is updated whole)."""

    name: str
    shape: tuple[int, ...]
    role: str
    reason: str
    blocks: Blocks | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns; a convolution's are its first axis and the rest."""
        return self.shape[0], math.prod(self.shape[1:])


def _matching(patterns: Sequence[str], name: str) -> str | None:
    return next((p for p in patterns if re.search(p, name)), None)


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    if isinstance(patterns, str):
        raise TypeError(f"{option}={patterns!r} is a string; give a list of regular expressions, [{patterns!r}].")
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"{option}: {pattern!r} matches no trainable parameter; the names look like {', '.join(names[:3])}."
            )


def _output_head(model: nn.Module) -> str | None:
    """Name of the last linear or convolution, when it is the model's last child itself (``nn.Sequential(...,
    Linear)``)."""
    module, prefix = model, ""
    while True:
        children = list(module.named_children())
        if not children:
            break
        if isinstance(module, nn.ModuleList):
            return None
        last_name, module = children[-1]
        prefix = f"{prefix}{last_name}."
        if not isinstance(module, (nn.Sequential, nn.Linear, *_CONV)):
            return None
    if isinstance(module, (nn.Linear, *_CONV)):
        return f"{prefix}weight"
    return None


def route(
    model: nn.Module,
    roles: Sequence[str],
    force_scalar: Sequence[str] = (),
    force_spectral: Sequence[str] = (),
    split_blocks: SplitBlocks = None,
) -> tuple[Route, ...]:
    """A `Route` for every trainable parameter of `model`, in the order of ``named_parameters()``.

    Spectral: linear and (flattened) convolution weights with both sides at least 128 that are neither embedding nor
    output head. `roles` are those the optimizer handles; with no spectral role every parameter is ``"scalar"``.
    `force_scalar`, `force_spectral`: regular expressions searched in the full name; both at once is a ValueError.

    `split_blocks` (CMuon, 2608.02502): matrices that are several stacked ones are cut, and each block is updated as a
    matrix of its own. ``{r"\\.qkv\\.": 3, r"\\.wqkv\\.": (2048, 512, 512), r"\\.out\\.": ("columns", 8)}``: by regular
    expression, k equal blocks of rows, or blocks of these rows (grouped queries), or the same of columns; blocks that
    do not fit, or have a side under 128, are a ValueError. ``"auto"``: by name, what is known to be fused: q, k and v
    in three equal parts, k and v or gate and up in two, an adaLN projection by its width; the reason says what was
    recognized and not cut. The order of the rows cannot be seen: name what your attention interleaves.
    """
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    names = [n for n, _ in trainable]
    _check_patterns("force_scalar", force_scalar, names)
    _check_patterns("force_spectral", force_spectral, names)
    if force_spectral and "spectral" not in roles:
        raise ValueError(
            f"force_spectral={list(force_spectral)} has no effect: the optimizer updates every parameter element by "
            f"element; drop it, or use one with a spectral part (muon, normuon, sf_normuon)."
        )
    owners = {
        f"{prefix}.{key}" if prefix else key: module
        for prefix, module in model.named_modules(remove_duplicate=False)
        for key in module._parameters
    }
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    head = _output_head(model)
    # By identity, because a tied parameter goes by the first of its names.
    heads = {
        id(p)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name == head or (_HEAD_NAME.search(name) and not re.search(r"\.\d+\.", name))
    }

    def decide(name: str, p: nn.Parameter) -> tuple[str, str]:
        if "spectral" not in roles:
            return "scalar", "the recipe is elementwise"
        off, on = _matching(force_scalar, name), _matching(force_spectral, name)
        if off and on:
            raise ValueError(f"{name} matches both force_scalar ({off!r}) and force_spectral ({on!r}); keep one.")
        if off:
            return "scalar", f"force_scalar {off!r}"
        if p.ndim < 2 or p.numel() == 0:
            if on:
                raise ValueError(f"force_spectral {on!r}: {name} of shape {tuple(p.shape)} is not a matrix.")
            return "scalar", f"{p.ndim}-D" if p.numel() else "empty"
        if on:
            return "spectral", f"force_spectral {on!r}"
        if id(p) in embeddings:
            return "scalar", "embedding"
        if id(p) in heads:
            return "scalar", "output head"
        is_conv = isinstance(owners.get(name), _CONV)
        if p.ndim > 2 and not is_conv:
            return "scalar", f"{p.ndim}-D and not a convolution"
        rows, columns = p.shape[0], p.numel() // p.shape[0]
        if min(rows, columns) < SPECTRAL_MIN_SIDE:
            return "scalar", f"a side under {SPECTRAL_MIN_SIDE}"
        return "spectral", f"{rows}×{columns} matrix" + (" (flattened convolution)" if is_conv else "")

    routes = tuple(Route(n, tuple(p.shape), *decide(n, p)) for n, p in trainable)
    if split_blocks is None:
        return routes
    if isinstance(split_blocks, str):
        if split_blocks != "auto":
            raise ValueError(
                f"split_blocks={split_blocks!r} is not known; give 'auto' or {{regular expression: blocks}}."
            )
        modules = dict(model.named_modules(remove_duplicate=False))
        return tuple(_cut_by_name(r, modules) if r.role == "spectral" else r for r in routes)
    return _cut_as_told(routes, split_blocks, "spectral" in roles)


def _cut_as_told(routes: tuple[Route, ...], split_blocks: Mapping[str, BlockSpec], spectral: bool) -> tuple[Route, ...]:
    if split_blocks and not spectral:
        raise ValueError(
            f"split_blocks={dict(split_blocks)} has no effect: the optimizer updates every parameter element by "
            f"element; drop it, or use one with a spectral part (muon, normuon, sf_normuon)."
        )
    _check_patterns("split_blocks", tuple(split_blocks), [r.name for r in routes])
    matrices = [r for r in routes if r.role == "spectral"]
    for pattern in split_blocks:
        if not any(re.search(pattern, r.name) for r in matrices):
            other = next(r for r in routes if re.search(pattern, r.name))
            raise ValueError(
                f"split_blocks: {pattern!r} matches no matrix on the spectral path; {other.name} {list(other.shape)} "
                f"is updated element by element ({other.reason})."
            )

    def cut(r: Route) -> Route:
        patterns = [p for p in split_blocks if re.search(p, r.name)]
        if r.role != "spectral" or not patterns:
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

    return tuple(map(cut, routes))


def _read(spec: Any, r: Route, pattern: str) -> Blocks | None:
    """The blocks that an entry of `split_blocks` means for this matrix; None for a single one."""
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
    """The route with the blocks that the parameter's name and the module around its layer tell of."""
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
