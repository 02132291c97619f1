"""Tests: how a step on several ranks is made."""

from __future__ import annotations

import torch

from fusion_compile._step.together import contents


def test_a_number_for_the_bits_of_each_tensor() -> None:
    one = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(True)}
    other = {name: t.clone() for name, t in one.items()}
    assert contents(one) == contents(other)
    other["b"][0] = 1.0078125  # the next bf16 number
    assert [name for name in one if contents(one)[name] != contents(other)[name]] == ["b"]
