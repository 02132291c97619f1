"""How weights of lower precision than the state are updated: with a master, with what their rounding lost, or without.

The module's bank is the truth of every form but ``"master"``. The flat state then has no ``params`` entry for such a
bank: `unpacked` computes it at the beginning of a step, `packed` turns it into what is kept at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._state.banks import Bank, Layout
from fusion_compile._state.exact_bits import join, split
from fusion_compile._types import Tensors
from fusion_compile.optim._rounding_noise import Draw, RoundingNoise
from fusion_compile.optim._transform import BankInfos
from fusion_compile.optim.codecs.stochastic import stochastic_bf16

FORMS = ("master", "exact", "kahan", "stochastic", "round")
ALIGNMENT = 128
"""Entries at whose multiples parameters start in a flat bank that is rounded at random, to keep its table small."""
COUNT, SEED = keys.optimizer("rounding/count"), keys.optimizer("rounding/seed")


def check_form(half_precision: object) -> None:
    """Raise ValueError unless `half_precision` is one of `FORMS`."""
    if half_precision not in FORMS:
        raise ValueError(f"half_precision={half_precision!r} is not known; use one of {', '.join(map(repr, FORMS))}.")


def refuse_banks(half_precision: str, layout: Layout) -> None:
    """Raise ValueError for banks that the form cannot hold, and warn of the form that loses updates."""
    half = [b for b in layout.banks if b.dtype != layout.state_dtype]
    if half_precision == "master" or not half:
        return
    name = half[0].places[0].name
    if layout.state_dtype != torch.float32:
        raise ValueError(
            f"half_precision={half_precision!r} with {layout.state_dtype} parameters in the model, so that {name} "
            f"({half[0].dtype}) is updated in {layout.state_dtype}; use half_precision='master', or fp32 parameters."
        )
    other = next((b for b in half if b.dtype != torch.bfloat16), None)
    if other is not None and half_precision in ("exact", "stochastic"):
        why = {
            "exact": "a float16 number and 16 bits are no fp32 number, whose exponent is longer",
            "stochastic": "the noise is that of the 16 bits between bfloat16 and fp32",
        }[half_precision]
        raise ValueError(
            f"half_precision={half_precision!r}, and {other.places[0].name} is {other.dtype}: {why}. Convert the model "
            f"to bfloat16, or use 'master' or 'kahan'."
        )
    if half_precision == "round":
        warnings.warn(
            f"half_precision='round': an update of {name} ({half[0].dtype}) below half of a step of its dtype is lost, "
            f"in every step again. Use 'stochastic', which takes as many bytes and loses none in the mean.",
            stacklevel=4,
        )


def entries(half_precision: str, layout: Layout, module_banks: Tensors) -> Tensors:
    """The entries of the flat state that hold the weights, before the first step."""
    state: Tensors = {}
    drawn = False
    for bank in layout.banks:
        own = module_banks[bank.key]
        if bank.dtype == layout.state_dtype:
            state[keys.params(bank.key)] = own
            continue
        if half_precision == "master":
            state[keys.params(bank.key)] = own.to(layout.state_dtype)
        state[keys.module(bank.key)] = own
        if half_precision == "exact":
            state[keys.mantissa(bank.key)] = torch.zeros_like(own, dtype=torch.int16)
        elif half_precision == "kahan":
            state[keys.compensation(bank.key)] = torch.zeros_like(own)
        drawn |= half_precision == "stochastic"
    if drawn:
        count = torch.zeros((), dtype=torch.int64, device=layout.device)
        state[COUNT], state[SEED] = count, count + (torch.initial_seed() & 0x7FFFFFFF)
    return state


def noise_for(
    half_precision: str, layout: Layout, banks: Tensors, infos: BankInfos | None = None
) -> RoundingNoise | None:
    """The noise of the module's `banks` where they are rounded at random, with its tables; else None.

    `infos`: what is known of the banks, if it is not what `layout` tells.
    """
    if half_precision != "stochastic":
        return None
    noise = RoundingNoise(layout.infos if infos is None else infos)
    noise.prepare({b.key: banks[b.key] for b in layout.banks if b.dtype != layout.state_dtype})
    return noise


def weights_of(bank: Bank, state: Tensors) -> Tensor:
    """The weights of `bank` that the optimizer updates, in the state dtype."""
    held = state.get(keys.params(bank.key))
    if held is not None:
        return held
    shown = state[keys.module(bank.key)]
    lost = state.get(keys.mantissa(bank.key))
    if lost is not None:
        return join(shown, lost)
    lost = state.get(keys.compensation(bank.key))
    wide = shown.to(torch.float32)
    return wide if lost is None else wide + lost.to(torch.float32)


def unpacked(layout: Layout, state: Tensors) -> Tensors:
    """`state` with a ``params`` entry for every bank. Does not change `state`."""
    return {**state, **{keys.params(b.key): weights_of(b, state) for b in layout.banks}}


def counted(state: Tensors) -> Tensors:
    """The count of updates after this one, where weights are rounded at random."""
    return {COUNT: state[COUNT] + 1} if COUNT in state else {}


def packed(layout: Layout, new: Tensors, before: Tensors, kept: Tensors, noise: RoundingNoise | None) -> Tensors:
    """`new` with what is kept of every bank's weights in place of those.

    `before`: the state before the update, unpacked; `kept`: the same as it is kept. A weight that did not change keeps
    what was kept of it.
    """
    after = dict(new)
    for bank in layout.banks:
        name = keys.module(bank.key)
        if name not in kept:
            continue
        weights = new[keys.params(bank.key)]
        if keys.params(bank.key) in kept:
            after[name] = weights.to(bank.dtype)
            continue
        del after[keys.params(bank.key)]
        if bank.dtype == weights.dtype:  # a part of a bank that lies elsewhere whole
            after[name] = weights
            continue
        mantissa, compensation = keys.mantissa(bank.key), keys.compensation(bank.key)
        if mantissa in kept:
            after[name], after[mantissa] = split(weights)
        elif compensation in kept:
            same = weights == before[keys.params(bank.key)]
            shown = weights.to(bank.dtype)
            lost = weights - shown.to(weights.dtype)
            lost = torch.where(lost.isfinite(), lost, torch.zeros_like(lost)).to(bank.dtype)
            after[name] = torch.where(same, kept[name], shown)
            after[compensation] = torch.where(same, kept[compensation], lost)
        elif COUNT in kept:
            assert noise is not None
            draw = Draw(kept[SEED], kept[COUNT], "weights")
            after[name] = stochastic_bf16(weights, noise.draw(bank.key, weights, draw))
        else:
            after[name] = weights.to(bank.dtype)
    return after


def shown_weights(layout: Layout, state: Tensors) -> Tensors:
    """By bank, what the module holds of weights that have no master: what a loss at the weights sees."""
    return {
        b.key: state[keys.module(b.key)]
        for b in layout.banks
        if keys.module(b.key) in state and keys.params(b.key) not in state
    }


def forget_lost(layout: Layout, state: Tensors, names: Collection[str]) -> None:
    """Set to zero what the rounding of the parameters `names` lost, because somebody wrote them since."""
    if not names:
        return
    with torch.no_grad():
        for bank in layout.banks:
            for lost in (keys.mantissa(bank.key), keys.compensation(bank.key)):
                if lost in state:
                    for place, part in zip(bank.places, bank.split(state[lost]), strict=True):
                        if place.name in names:
                            part.zero_()


def keeps_lost(state: Tensors) -> bool:
    """Whether anything that a rounding lost is kept."""
    return any(keys.split(key)[0] in keys.LOST for key in state)


def alignment_of(half_precision: str, dtypes: Sequence[torch.dtype]) -> int:
    """Entries at whose multiples parameters start in flat banks."""
    return ALIGNMENT if half_precision == "stochastic" and torch.bfloat16 in dtypes else 1
