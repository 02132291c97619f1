"""K-Optimizers' keywords in this package's words."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from fusion_compile._types import Tensors
from fusion_compile.optim._combine import chain
from fusion_compile.optim._inner import Inner, lift, merge
from fusion_compile.optim._transform import BankInfos, Context, Number, State, Transform, bound
from fusion_compile.optim.add_decayed_weights import add_decayed_weights
from fusion_compile.optim.average_steps import descend
from fusion_compile.optim.cautious import cautious
from fusion_compile.optim.centralize_gradients import centralize_gradients
from fusion_compile.optim.kaon_recipes import adakaon, adamuon
from fusion_compile.optim.mechanic import mechanic
from fusion_compile.optim.prodigy import prodigy
from fusion_compile.optim.scale_by_learning_rate import scale_by_learning_rate
from fusion_compile.optim.scale_by_lion import scale_by_lion
from fusion_compile.optim.stored import stored_as

FORMS = {"stochastic_rounding": "stochastic", "kahan": "kahan", "kahan16": "exact", "none": "round"}
"""``bf16_method`` -> ``half_precision``."""
CODECS = {"float32": "fp32", "bfloat16": "bf16", "int8": "int8", "4bit": "4bit"}
"""``momentum_dtype`` -> a codec's name."""
OWN = ("model", "mode", "backend", "release_gradients")
"""Keywords of this package that each class takes besides."""
_SAY_NOTHING = (
    *("foreach", "foreach_batch_cutoff", "foreach_stack_budget", "foreach_warmup", "fused", "fused_tile_cap"),
    *("compile", "auto_lr_freeze", "auto_lr_scale", "auto_lr_fuse_rel", "auto_lr_d0"),
)
"""How the source runs its update, which is one program here."""
_MUST_BE: dict[str, tuple[Any, str]] = {
    "auto_lr": (False, "its search restarts the training; use KProdigy or Autokaon"),
    "factor_conv_as_matrix": (True, "rows of a convolution's weight are those of its first axis"),
    "bias_correction": (False, "the factored rescale undoes it"),
    "d_update_freq": (1, "d is computed on the device, and nothing waits for it"),
}
"""Keywords of which one value is known here, and why the others are not needed."""


def own_words(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """This package's own keywords among `given`.

    TypeError for a keyword that `kind` does not know, with those that it knows; ValueError for another method.
    """
    for name, (only, why) in _MUST_BE.items():
        if name in given and given[name] != only:
            raise ValueError(f"{kind.__name__}({name}={given[name]!r}) is not here: {why}.")
    known = [n for n in inspect.signature(kind).parameters if n not in ("self", "params", "others")]
    for name in given:
        if name not in (*OWN, *_SAY_NOTHING, *_MUST_BE):
            raise TypeError(
                f"{kind.__name__} has no keyword {name!r}; it has {', '.join((*known, *OWN))}, and takes "
                f"{', '.join(_SAY_NOTHING)}, which say nothing here."
            )
    return {name: given[name] for name in OWN if name in given}


def codec_named(momentum_dtype: str, block: int) -> str:
    """The codec of ``momentum_dtype``. ValueError for one that is not known, or another block than the codec's."""
    if momentum_dtype not in CODECS:
        raise ValueError(f"momentum_dtype={momentum_dtype!r} is not known; use one of {', '.join(map(repr, CODECS))}.")
    if momentum_dtype == "4bit" and block != 128:
        raise ValueError(f"momentum_4bit_block={block!r}: blocks of 4 bits have 128 entries here; leave it out.")
    return CODECS[momentum_dtype]


def form_named(bf16_method: str) -> str:
    """The ``half_precision`` of ``bf16_method``. ValueError for one that is not known."""
    if bf16_method not in FORMS:
        raise ValueError(f"bf16_method={bf16_method!r} is not known; use one of {', '.join(map(repr, FORMS))}.")
    return FORMS[bf16_method]


def threshold_of(clip_threshold: float) -> float:
    """The source's 0 is no bound."""
    return clip_threshold if clip_threshold > 0 else math.inf


# -- what the source's classes are, where that is no recipe of this package ---------------------------------------


def lion_of(
    lr: Number,
    betas: tuple[Number, Number],
    weight_decay: Number,
    *,
    momentum: str,
    is_cautious: bool,
    centralize: bool,
) -> Transform:
    """Lion whose mask holds the decay, too."""
    direction = chain(scale_by_lion(betas), add_decayed_weights(weight_decay))
    masked = cautious(direction) if is_cautious else direction
    before = [centralize_gradients()] if centralize else []
    return stored_as(chain(*before, masked, scale_by_learning_rate(lr), name="lion"), momentum)


def adamuon_of(*, centralize: bool, **options: Any) -> Transform:
    """`adamuon`, after centred gradients if asked."""
    whole = adamuon(**options)
    return chain(centralize_gradients(), whole, name="adamuon") if centralize else whole


def kprodigy_of(*, is_cautious: bool, centralize: bool, **options: Any) -> Transform:
    """`prodigy`, masked and after centred gradients, as asked."""
    whole = prodigy(bounds_root=True, **options)
    if is_cautious:
        whole = chain(cautious(_uphill(whole)), descend())
    return chain(*([centralize_gradients()] if centralize else []), whole, name="kprodigy")


def autokaon_of(tuner: Mapping[str, Any], options: Mapping[str, Any]) -> Transform:
    """`mechanic` with the numbers `tuner` around `adakaon` with `options`."""
    return mechanic(adakaon(**options), **tuner).with_extras(name="autokaon")


def _uphill(base: Transform) -> Transform:
    """`base` without the sign of its step: a direction again, for `cautious`."""

    def update(updates: Tensors, state: State, params: Tensors, context: Context) -> tuple[Tensors, State]:
        moves, after = base.update(updates, state, params, context)
        return {k: -move for k, move in moves.items()}, after

    def bind(infos: BankInfos) -> Transform:
        return _uphill(bound(base, infos))

    same = Inner(lambda state: state, lambda state, part: part)
    extras = merge(base.name, [lift(base.extras, same)])._replace(descends=False, bind=bind)
    return Transform(base.init, update, extras)
