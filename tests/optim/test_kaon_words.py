"""Keywords of kaon: what each becomes, and which are refused with what sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile.optim import kaon
from fusion_compile.optim._kaon_words import codec_named, form_named, kprodigy_of, threshold_of
from tests.optim.walks import Walk


def test_words_of_codecs_forms_and_bounds() -> None:
    assert [codec_named(n, 128) for n in ("float32", "bfloat16", "int8", "4bit")] == ["fp32", "bf16", "int8", "4bit"]
    forms = [form_named(n) for n in ("stochastic_rounding", "kahan", "kahan16", "none")]
    assert forms == ["stochastic", "kahan", "exact", "round"]
    assert threshold_of(0.0) == float("inf") and threshold_of(2.0) == 2.0


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"momentum_dtype": "int4"},
            ValueError,
            "momentum_dtype='int4' is not known; use one of 'float32', 'bfloat16'",
        ),
        ({"momentum_dtype": "4bit", "momentum_4bit_block": 64}, ValueError, "blocks of 4 bits have 128 entries"),
        ({"bf16_method": "kahan8"}, ValueError, "bf16_method='kahan8' is not known; use one of 'stochastic_rounding'"),
        ({"auto_lr": True}, ValueError, "use KProdigy or Autokaon"),
        ({"factor_conv_as_matrix": False}, ValueError, "rows of a convolution's weight are those of its first axis"),
        ({"momentun": 1}, TypeError, "Adakaon has no keyword 'momentun'; it has lr, betas, .*gradient_centralization"),
        ({"lr": -1.0}, ValueError, "a negative rate goes uphill"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        kaon.Adakaon(nn.Linear(2, 2).parameters(), **options)


def test_words_about_speed_say_nothing() -> None:
    optimizer = kaon.AdaMuon(
        nn.Linear(2, 2).parameters(), foreach=False, compile=True, auto_lr=False, auto_lr_scale=2.0, mode="eager"
    )
    assert optimizer.defaults["lr"] == 0.02


def test_a_cautious_prodigy_holds_entries_that_disagree_still() -> None:
    """After one step along (1, 1) and one against it in one entry, that entry waits, and the other moves twice."""
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0, "centralize": False}
    masked = Walk(kprodigy_of(is_cautious=True, **options), {"w": torch.ones(2)})
    plain = Walk(kprodigy_of(is_cautious=False, **options), {"w": torch.ones(2)})
    for walk in (masked, plain):
        walk({"w": torch.ones(2)})
    against = torch.tensor([-0.1, 1.0])
    moved, other = masked({"w": against})["w"], plain({"w": against})["w"]
    assert float(moved[0]) == 0 and float(other[0]) != 0
    torch.testing.assert_close(moved[1], 2 * other[1])
