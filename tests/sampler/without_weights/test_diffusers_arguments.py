"""Made-up arguments have the sizes, dtypes and devices of a call."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from fusion_compile._sampler.without_weights.diffusers_arguments import FAMILIES, CallSizes, Maker


def maker(**sizes: int) -> Maker:
    model: Any = nn.Linear(4, 4).bfloat16()
    model.norm = nn.LayerNorm(2)  # a few weights in float32
    model.config = types.SimpleNamespace()
    return Maker(model, CallSizes(**sizes))


def test_dtype_and_device_are_those_of_most_weights() -> None:
    made = maker()
    assert made.dtype is torch.bfloat16 and made.device == torch.device("cpu") and made.batch == 2
    assert made.randn(3, 4).dtype is torch.bfloat16


def test_sizes_that_are_left_out_are_the_usual_ones() -> None:
    assert maker().latent(8) == (8, 8) and maker(height=4).latent(8) == (4, 4)
    assert maker(height=4, width=6).latent(8) == (4, 6)
    assert maker().text(77) == 77 and maker(text=5).text(77) == 5 and maker(frames=3).frames(9) == 3


def test_a_mask_hides_the_last_fifth_of_the_tokens() -> None:
    assert maker(batch=1).mask(10, torch.int64).tolist() == [[1] * 8 + [0] * 2]


def test_positions_of_a_grid_are_rows_and_columns() -> None:
    assert maker().grid_ids(2, 2, 3).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_rotary_tables_have_each_frequency_in_two_columns() -> None:
    cos, sin = maker().rotary(3, 4)
    assert cos.shape == sin.shape == (3, 4)
    assert torch.equal(cos[:, 0], cos[:, 1]) and torch.equal(sin[1, :1], torch.ones(1).sin())
    assert cos[0].tolist() == [1, 1, 1, 1] and sin[0].tolist() == [0, 0, 0, 0]


def test_one_value_for_each_sample() -> None:
    assert maker(batch=3).full(2.0).tolist() == [2, 2, 2]
    assert maker().rows(8.0, 4.0, dtype=torch.float32).tolist() == [[8, 4], [8, 4]]
    assert maker().labels(1).tolist() == [0, 0]


def test_families_say_how_a_pipeline_counts_time() -> None:
    assert {family.clock for family in FAMILIES.values()} == {"index", "thousand", "unit"}
    assert [name for name, family in FAMILIES.items() if family.like_weights] == ["HunyuanDiT2DModel"]
    assert [name for name, family in FAMILIES.items() if not family.per_sample] == ["StableAudioDiTModel"]
