"""Tests: the matrices of models are counted as their papers count them."""

from __future__ import annotations

import pytest

from fusion_compile._scaling.models import MODELS, dit, llama


@pytest.mark.parametrize(
    ("name", "entries", "matrices"),
    [("dit-b", 127e6, 60), ("dit-l", 453e6, 120), ("dit-xl", 669e6, 140), ("dit-10b", 9.97e9, 165)],
)
def test_sizes_of_diffusion_transformers(name: str, entries: float, matrices: int) -> None:
    model = MODELS[name]
    assert model.entries == pytest.approx(entries, rel=5e-3)
    assert len(model.matrices) == matrices


def test_models_reach_from_a_tenth_to_twenty_billions() -> None:
    sizes = [m.entries / 1e9 for m in MODELS.values()]
    assert min(sizes) < 0.15
    assert 19 < max(sizes) < 21


def test_a_llama_has_seven_matrices_a_block() -> None:
    model = llama("a", 8, 2, key=4, mlp=16, tokens=10)
    assert len(model.matrices) == 14
    assert model.entries == 2 * (2 * 64 + 2 * 32 + 3 * 128)
    assert MODELS["llama-8b"].entries == pytest.approx(7.0e9, rel=0.01)  # without embedding and head, 1.05e9
    assert dit("b", 2, 1).tokens == 256
