"""Any transform with parts of its state in fewer bytes: decode, update, encode, in the one program of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim._inner import Inner, lift, merge
from fusion_compile.optim._rounding_noise import Draw, RoundingNoise
from fusion_compile.optim._stored_fields import fields_of, is_banked, replaced
from fusion_compile.optim._transform import (
    ELEMENTWISE,
    BankInfos,
    Context,
    Periodic,
    State,
    Transform,
    bound,
    check_transform,
)
from fusion_compile.optim._tree import count_like
from fusion_compile.optim.codecs.all_codecs import codec_of
from fusion_compile.optim.codecs.codec import Codec, is_finite


class StoredState(NamedTuple):
    """`base`: the wrapped transform's state, in which each stored field is what its codec made of it. `draws`: if a
    codec rounds at random, ``count`` of updates and ``seed``, both 0-dim; else empty."""

    base: State
    draws: Tensors


class _Kept(NamedTuple):
    """One stored field before an update: as it lies in the state, and decoded."""

    content: Any
    decoded: Tensors


def stored(base: Transform, **fields: str) -> Transform:
    """Keep `fields` of the state of `base` in codecs: ``stored(sf_normuon(), mu="int8", z="bf16")``.

    In one program a step decodes them, updates, and encodes them again. The update that is applied is the one that was
    computed, before it is encoded: codecs touch what the next step remembers and nothing else. Every field of that name
    in any part of `base` is stored. An entry that is not finite stays so; under ``skip_nonfinite`` it stays as it was.

    =================== ============ =========== =====================================================
    codec               bytes        rounds      for
    =================== ============ =========== =====================================================
    ``"fp32"``          4            not at all
    ``"bf16"``          2            at random   any field
    ``"int8"``          1, 4 a row   to nearest  momenta
    ``"int8_companded"`` 1, 4 a row  at random   second moments
    ``"4bit"``          0.53         to nearest  momenta
    =================== ============ =========== =====================================================

    A row is the last axis of a stacked bank; in a flat bank ``"int8"`` shares a scale among 512 entries, ``"4bit"``
    among 128, and every parameter starts such a block. What is rounded at random has the right mean: averages that move
    by less than a step do not stall. It depends on ``torch.initial_seed()`` at the start, the count of updates, the
    parameter's name and the entry's place, and on no generator.

    Args:
        base: Any transform.
        **fields: Codec by name of a field of the state (``mu``, ``nu``, ``z``, …).

    Returns:
        A transform with the roles, numbers and step of `base`.

    Raises:
        ValueError: A codec or a field is not known (the sentence lists both); a field holds numbers that must be exact;
            a codec cannot hold a second moment.

    Example:
        >>> from fusion_compile import optim
        >>> optimizer = optim.stored(optim.adamw(1e-3), mu="int8", nu="int8_companded")
        >>> optimizer.name
        'adamw'
    """
    check_transform("stored(), base,", base)
    if not fields:
        raise ValueError(f"stored() was given no field; give a codec by field: stored({base.name}(), mu='int8').")
    codecs = {field: codec_of(f"stored(), {field}", name) for field, name in fields.items()}
    for field, codec in codecs.items():
        if field in base.extras.second_moments and codec.refuses_second_moments:
            raise ValueError(
                f"stored(), {field}={codec.name!r}: {field} of {base.name} is a second moment, and "
                f"{codec.refuses_second_moments}."
            )
    if (probe := _probe(base)) is not None:
        _refuse_other_fields(base, probe, list(_probe_banks(base)), codecs)
    return _stored(base, {f: c for f, c in codecs.items() if c.name != "fp32"}, RoundingNoise({}))


def _stored(base: Transform, codecs: Mapping[str, Codec], noise: RoundingNoise) -> Transform:
    draws = any(codec.draws for codec in codecs.values())

    def init(params: Tensors) -> StoredState:
        inside = base.init(params)
        _refuse_other_fields(base, inside, list(params), codecs)
        if draws:
            noise.prepare(params)

        def encode(path: str, field: str, content: Any) -> Any:
            if not is_banked(content, params):
                return content
            return _packed(field, codecs[field], {k: codecs[field].encode(t, None) for k, t in content.items()})

        whole = replaced(inside, codecs, encode)
        numbers = {"count": count_like(params), "seed": count_like(params) + (torch.initial_seed() & 0x7FFFFFFF)}
        return StoredState(whole, numbers if draws else {})

    def decoded(state: StoredState, params: Tensors) -> tuple[State, dict[str, _Kept]]:
        kept: dict[str, _Kept] = {}

        def decode(path: str, field: str, content: Any) -> Any:
            parts = _unpacked(field, codecs[field], content, params)
            if parts is None:
                return content
            kept[path] = _Kept(content, {k: codecs[field].decode(p, params[k]) for k, p in parts.items()})
            return kept[path].decoded

        return replaced(state.base, codecs, decode), kept

    def encoded(inside: State, kept: Mapping[str, _Kept], numbers: Tensors, finite: bool) -> State:
        def encode(path: str, field: str, content: Any) -> Any:
            if path not in kept:
                return content
            before, codec = kept[path], codecs[field]
            old = _unpacked(field, codec, before.content, before.decoded)
            assert old is not None
            after = {}
            for key, value in content.items():
                if value is before.decoded[key]:
                    after[key] = old[key]
                    continue
                t = torch.where(is_finite(value), value, before.decoded[key]) if finite else value
                if codec.draws:
                    draw = Draw(numbers["seed"], numbers["count"], path)
                    after[key] = codec.encode(t, noise.draw(key, t, draw))
                else:
                    after[key] = codec.encode(t, None)
            return _packed(field, codec, after)

        return replaced(inside, codecs, encode)

    def update(updates: Tensors, state: StoredState, params: Tensors, context: Context) -> tuple[Tensors, StoredState]:
        inside, kept = decoded(state, params)
        moved, after = base.update(updates, inside, params, context)
        whole = encoded(after, kept, state.draws, context.finite)
        counted = {"count": state.draws["count"] + 1, "seed": state.draws["seed"]} if draws else {}
        return moved, StoredState(whole, counted)

    def gradient_point(params: Tensors, state: StoredState, context: Context) -> Tensors:
        assert base.gradient_point is not None
        return base.gradient_point(params, decoded(state, params)[0], context)

    def on_decoded(periodic: Periodic) -> Periodic:
        def wrapped(work: Any) -> Any:
            def run(state: StoredState, params: Tensors, context: Context) -> StoredState:
                inside, kept = decoded(state, params)
                after = work(inside, params, context)
                return StoredState(encoded(after, kept, state.draws, context.finite), state.draws)

            return run

        first = None if periodic.first is None else wrapped(periodic.first)
        return periodic._replace(update=wrapped(periodic.update), first=first)

    def bind(infos: BankInfos) -> Transform:
        return _stored(bound(base, infos), codecs, RoundingNoise(infos))

    inner = Inner(lambda state: state.base, lambda state, part: state._replace(base=part))
    extras = merge(base.name, [lift(base.extras, inner)])._replace(
        gradient_point=None if base.gradient_point is None else gradient_point,
        periodic=tuple(map(on_decoded, base.periodic)),
        bind=bind,
        alignment=max([base.extras.alignment, *(codec.block for codec in codecs.values())]),
        stored={**base.extras.stored, **{field: codec.name for field, codec in codecs.items()}},
    )
    return Transform(init, update, extras)


def _packed(field: str, codec: Codec, by_bank: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """What is kept of a field: by bank key, or, of a codec with scales, by ``mu_int8`` and ``mu_int8_scale`` first.

    The codec is part of these names, so that nothing takes codes for numbers, or one codec's for another's.
    """
    suffixes = list(dict.fromkeys([suffix for parts in by_bank.values() for suffix in parts]))
    if suffixes == [""]:
        return {key: parts[""] for key, parts in by_bank.items()}
    return {_name(field, codec, suffix): {key: parts[suffix] for key, parts in by_bank.items()} for suffix in suffixes}


def _unpacked(field: str, codec: Codec, content: Any, params: Mapping[str, Any]) -> dict[str, dict[str, Tensor]] | None:
    """The inverse of `_packed`: parts by bank key; None for a content that was not encoded."""
    if not isinstance(content, dict) or not content:
        return None
    codes = _name(field, codec, "")
    if codes not in content:
        return {key: {"": t} for key, t in content.items()} if is_banked(content, params) else None
    prefix = f"{codes}_"
    names = {name: name.removeprefix(prefix) if name != codes else "" for name in content}
    return {key: {suffix: content[name][key] for name, suffix in names.items()} for key in content[codes]}


def _name(field: str, codec: Codec, suffix: str) -> str:
    return f"{field}_{codec.name}_{suffix}" if suffix else f"{field}_{codec.name}"


def _probe_banks(base: Transform) -> Tensors:
    roles = base.roles or (ELEMENTWISE,)
    return {
        role if role == ELEMENTWISE else f"{role}/128x128": torch.empty(
            (1024,) if role == ELEMENTWISE else (1, 128, 128), device="meta"
        )
        for role in roles
    }


def _probe(base: Transform) -> State | None:
    """The state of `base` for banks without data; None where it needs values."""
    try:
        return base.init(_probe_banks(base))
    except Exception:  # of any kind: a part that reads a value fails in its own way, and `init` checks again
        return None


def _refuse_other_fields(base: Transform, state: State, banks: Sequence[str], codecs: Mapping[str, Codec]) -> None:
    """Raise ValueError for a field that `state` does not have, or whose numbers must be exact."""
    tensors, numbers = fields_of(state, banks)
    for field, codec in codecs.items():
        if field in tensors:
            continue
        if field in numbers:
            raise ValueError(
                f"stored(), {field}={codec.name!r}: {field} of {base.name} is a number that all parameters share (a "
                f"power of β, a count, a step size), and its rounding would grow from step to step. It takes 4 or 8 "
                f"bytes in all; leave it as it is."
            )
        if field in base.extras.stored:
            raise ValueError(f"stored(): {field} of {base.name} is stored as {base.extras.stored[field]!r} already.")
        raise ValueError(
            f"stored(): {base.name} has no field {field!r}; it has {', '.join(tensors) or 'none that can be stored'}."
        )


def stored_as(transform: Transform, momentum: str = "fp32", second_moment: str = "fp32") -> Transform:
    """What recipes mean by ``momentum=`` and ``second_moment=``: the codecs of ``mu`` and ``nu``.

    ``"int8"`` of a second moment is ``"int8_companded"``.
    """
    wanted = {"mu": codec_of("momentum", momentum), "nu": codec_of("second_moment", second_moment)}
    names = {f: c.name for f, c in wanted.items() if c.name != "fp32"}
    if names.get("nu") == "int8":
        names["nu"] = "int8_companded"
    return stored(transform, **names) if names else transform


def decay_and_codec(momentum: float | str, default: float) -> tuple[float, str]:
    """What ``momentum=`` means where it is the decay of an average: a number, or the codec of that average.

    ValueError for a codec that is not known.
    """
    return (default, codec_of("momentum", momentum).name) if isinstance(momentum, str) else (momentum, "fp32")
