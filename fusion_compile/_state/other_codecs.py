"""Fields that a checkpoint keeps in other codecs than a run does: as plain numbers, and into the run's codec again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Place
from fusion_compile.optim.codecs.all_codecs import CODECS

_CODED = re.compile(
    r"^(?P<field>(?:.*\.)?(?P<own>\w+))\.(?P=own)_(?P<codec>int8_companded|int8|4bit)(?P<scale>_scale)?\.(?P<name>.+)$"
)
"""``base.0.mu.mu_int8.<parameter>`` and ``base.0.mu.mu_int8_scale.<parameter>``."""


class _Kept(NamedTuple):
    """One parameter's part of a coded field. `plain`: the name that it has where nothing is coded."""

    plain: str
    codec: str
    place: Place
    codes: Tensor
    scale: Tensor


def in_plain_numbers(saved: Mapping[str, Any], own: Tensors, layout: Layout) -> dict[str, Any]:
    """`saved` with every field decoded that `own` does not keep in the same codec."""
    found = {k: v for k, v in _coded(saved, layout).items() if k not in own}
    scales = {_scale_of(name, kept.codec) for name, kept in found.items()}
    rest = {name: value for name, value in saved.items() if name not in found and name not in scales}
    return {**rest, **{kept.plain: _decoded(kept) for kept in found.values()}}


def stand_ins(own: Tensors, saved: Mapping[str, Any], layout: Layout) -> dict[str, tuple[Tensor, list[str]]]:
    """By plain name, memory for the numbers of each coded field of `own` that `saved` keeps otherwise, and the names
    whose place it takes."""
    made: dict[str, tuple[Tensor, list[str]]] = {}
    for name, kept in _coded(own, layout).items():
        if name not in saved:
            numbers = torch.zeros(kept.place.shape, dtype=kept.scale.dtype, device=kept.scale.device)
            made[kept.plain] = numbers, [name, _scale_of(name, kept.codec)]
    return made


def encode_into(own: Tensors, numbers: Mapping[str, Tensor], layout: Layout) -> None:
    """Write `numbers`, by plain name, into the coded fields of `own`, to nearest."""
    for kept in _coded(own, layout).values():
        if kept.plain in numbers:
            x = numbers[kept.plain].reshape(_bank_shape(kept))
            parts = CODECS[kept.codec].encode(x, None)
            kept.codes.copy_(parts[""].reshape(kept.codes.shape))
            kept.scale.copy_(parts["scale"].reshape(kept.scale.shape))


def codecs_differ(wanted: Mapping[str, Tensor], given: Mapping[str, Any]) -> str:
    """A sentence if `given` keeps a field of `wanted` in another codec; else ""."""
    here, there = _codecs(wanted), _codecs(given)
    fields = {f for f in {*here, *there} if here.get(f) != there.get(f) and _has(f, wanted) and _has(f, given)}
    told = [f"{f} as {there.get(f, 'fp32')} (here: {here.get(f, 'fp32')})" for f in sorted(fields)]
    if not told:
        mine, theirs = _by_path_inside(wanted), _by_path_inside(given)
        pairs = ((n, mine[n], theirs[n]) for n in mine if n in theirs)
        other = next(((n, a, b) for n, a, b in pairs if a != b and torch.bfloat16 in (a, b)), None)
        told = [f"{other[0]} in {other[2]} (here: {other[1]})"] if other is not None else []
    if not told:
        return ""
    return (
        f"the checkpoint keeps {', '.join(told)}. Give the recipe the codecs that saved it, or begin a training step "
        f"from the checkpoint with step.warm_start(), which converts them"
    )


def _has(field: str, names: Iterable[str]) -> bool:
    return any(field in name.split(".") for name in names)


def _by_path_inside(state: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """dtypes by name without the wrapper that keeps fields in codecs."""
    return {name.removeprefix("base."): t.dtype for name, t in state.items() if isinstance(t, Tensor)}


def _coded(state: Mapping[str, Any], layout: Layout) -> dict[str, _Kept]:
    """By name of its codes, every coded field of a parameter that lies in order."""
    places = {place.name: place for bank in layout.banks for place in bank.places if not place.order}
    found = {}
    for name, codes in state.items():
        match = _CODED.match(name)
        if match is None or match["scale"] or match["name"] not in places:
            continue
        scale = state.get(_scale_of(name, match["codec"]))
        if isinstance(codes, Tensor) and isinstance(scale, Tensor):
            plain = f"{match['field']}.{match['name']}"
            found[name] = _Kept(plain, match["codec"], places[match["name"]], codes, scale)
    return found


def _scale_of(name: str, codec: str) -> str:
    return name.replace(f"_{codec}.", f"_{codec}_scale.", 1)


def _bank_shape(kept: _Kept) -> tuple[int, ...]:
    """The shape of the parameter's part of a bank: flat, or matrices."""
    entries = kept.place.numel
    in_rows = kept.codes if kept.codec == "4bit" else kept.scale
    if in_rows.ndim == 1:
        return (entries,)
    matrices = in_rows.shape[0] if in_rows.ndim > 2 else 1
    return matrices, in_rows.shape[-2], entries // max(1, matrices * in_rows.shape[-2])


def _decoded(kept: _Kept) -> Tensor:
    shape = _bank_shape(kept)
    like = torch.empty(shape, dtype=kept.scale.dtype, device=kept.scale.device)
    codes, scale = kept.codes.reshape(-1), kept.scale
    if len(shape) > 1:
        codes = kept.codes.reshape(*shape[:2], -1)
        scale = scale.reshape(shape[0], -1) if kept.codec == "4bit" else scale.reshape(*shape[:2], 1)
    numbers: Tensor = CODECS[kept.codec].decode({"": codes, "scale": scale}, like)
    return numbers.reshape(kept.place.shape)


def _codecs(names: Iterable[str]) -> dict[str, str]:
    """Codec by field, of names with or without a parameter behind them."""
    found = (_CODED.match(name) or _CODED.match(f"{name}.of") for name in names)
    return {match["own"]: match["codec"] for match in found if match is not None}
