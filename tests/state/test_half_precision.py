"""What is kept of half-precision weights: packed and unpacked on a layout of two dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile._state import keys
from fusion_compile._state.banks import Layout, build_layout
from fusion_compile._state.half_precision import (
    COUNT,
    FORMS,
    check_form,
    counted,
    entries,
    forget_lost,
    keeps_lost,
    noise_for,
    packed,
    refuse_banks,
    shown_weights,
    unpacked,
)
from fusion_compile._state.routing import route
from fusion_compile._types import Tensors

HALF, FULL = "scalar/bfloat16", "scalar/float32"


def made(half_precision: str) -> tuple[Layout, Tensors]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16).to(torch.bfloat16), nn.Linear(3, 2))
    layout = build_layout(model, route(model, ("scalar",)))
    banks = layout.join({n: p.detach() for n, p in model.named_parameters()}, in_state_dtype=False)
    return layout, entries(half_precision, layout, banks)


def moved(half_precision: str, layout: Layout, kept: Tensors, by: Tensors) -> Tensors:
    before = unpacked(layout, kept)
    new = {keys.params(b): before[keys.params(b)] + by[b] for b in (HALF, FULL)} | counted(kept)
    noise = noise_for(half_precision, layout, {HALF: kept[keys.module(HALF)], FULL: kept[keys.params(FULL)]})
    return {**kept, **packed(layout, new, before, kept, noise)}


@pytest.mark.parametrize("half_precision", FORMS)
def test_a_small_update_is_kept_in_every_form_but_round(half_precision: str) -> None:
    """1,000 times a hundredth of bf16's step at 1: ten steps. One is 2⁻⁷."""
    layout, kept = made(half_precision)
    kept[keys.module(HALF)].fill_(1.0)
    if keys.params(HALF) in kept:
        kept[keys.params(HALF)].fill_(1.0)
    step = torch.full_like(kept[keys.module(HALF)], 2**-7 / 100, dtype=torch.float32)
    by = {HALF: step, FULL: torch.zeros_like(kept[keys.params(FULL)])}
    for _ in range(1000):
        kept = moved(half_precision, layout, kept, by)
    found = unpacked(layout, kept)[keys.params(HALF)]
    mean = float(found.mean() - 1) * 128
    if half_precision == "round":
        assert mean == 0
    elif half_precision == "stochastic":
        # 144 entries; a variance of at most 1/4 a step of 2⁻⁷ when drawn: √(1000 · 0.01 · 0.99 / 144) = 0.26
        assert abs(mean - 10) < 4 * 0.26 and int(kept[COUNT]) == 1000
    else:
        # What Kahan's sum lost is kept in bf16 itself, which loses up to 2⁻¹⁰ of a step each time.
        assert abs(mean - 10) < (1000 * 2**-10 if half_precision == "kahan" else 1e-2)  # and fp32 2⁻¹⁷ of one
    assert kept[keys.module(HALF)].dtype == torch.bfloat16


@pytest.mark.parametrize("half_precision", FORMS)
def test_no_update_changes_no_bit(half_precision: str) -> None:
    layout, kept = made(half_precision)
    by = {b: 1e-3 * torch.randn_like(unpacked(layout, kept)[keys.params(b)]) for b in (HALF, FULL)}
    kept = moved(half_precision, layout, kept, by)
    after = moved(half_precision, layout, kept, {b: torch.zeros_like(t) for b, t in by.items()})
    assert {k for k in kept if not torch.equal(kept[k], after[k])} <= {COUNT}


def test_exact_is_the_master_bit_for_bit() -> None:
    layout, exact = made("exact")
    _, master = made("master")
    for i in range(20):
        generator = torch.Generator().manual_seed(i)
        by = {
            b: 1e-3 * torch.randn(unpacked(layout, master)[keys.params(b)].shape, generator=generator)
            for b in (HALF, FULL)
        }
        exact, master = moved("exact", layout, exact, by), moved("master", layout, master, by)
        assert torch.equal(unpacked(layout, exact)[keys.params(HALF)], master[keys.params(HALF)])
    assert exact[keys.mantissa(HALF)].dtype == torch.int16 and keys.params(HALF) not in exact
    assert shown_weights(layout, exact).keys() == {HALF} and not shown_weights(layout, master)


def test_bytes_beside_the_module() -> None:
    sizes = {}
    for form in FORMS:
        _, kept = made(form)
        count = kept[keys.module(HALF)].numel()
        extra = sum(t.nbytes for k, t in kept.items() if k.endswith(HALF) and k != keys.module(HALF))
        sizes[form] = extra / count
    assert sizes == {"master": 4, "exact": 2, "kahan": 2, "stochastic": 0, "round": 0}


def test_what_was_written_loses_what_its_rounding_lost() -> None:
    for form in ("exact", "kahan"):
        layout, kept = made(form)
        kept = moved(
            form,
            layout,
            kept,
            {
                b: 1e-3 * torch.ones_like(t)
                for b, t in layout.join({p.name: torch.zeros(p.shape) for b in layout.banks for p in b.places}).items()
            },
        )
        assert keeps_lost(kept)
        forget_lost(layout, kept, {"0.bias"})
        views = layout.views({HALF: unpacked(layout, kept)[keys.params(HALF)], FULL: kept[keys.params(FULL)]})
        shown = layout.views({HALF: kept[keys.module(HALF)], FULL: kept[keys.params(FULL)]})
        assert torch.equal(views["0.bias"], shown["0.bias"].float())
        assert not torch.equal(views["0.weight"], shown["0.weight"].float())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="half_precision='exakt' is not known; use one of 'master', 'exact'"):
        check_form("exakt")
    half = nn.Linear(2, 2).to(torch.float16)
    for form in ("exact", "stochastic"):
        with pytest.raises(ValueError, match=rf"half_precision='{form}', and weight is torch.float16: .*bfloat16"):
            refuse_banks(form, build_layout(half, route(half, ("scalar",))))
    mixed = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), nn.Linear(2, 2).to(torch.float64))
    with pytest.raises(ValueError, match=r"with torch.float64 parameters in the model, so that 0.weight"):
        refuse_banks("exact", build_layout(mixed, route(mixed, ("scalar",))))
    refuse_banks("exact", build_layout(nn.Linear(2, 2), route(nn.Linear(2, 2), ("scalar",))))
    with pytest.warns(UserWarning, match="'round': an update of weight .* is lost"):
        refuse_banks("round", build_layout(half, route(half, ("scalar",))))
