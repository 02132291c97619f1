"""Every transformer, UNet and prior class that diffusers exports: exact in a sampler, or with its reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")

from tests.models.exported.run import EXPORTED, NOT_TRIED, exported_classes, outcome
from tests.models.tiny import TINY

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks" / "sampler_models.json"
NOT_EXACT = {
    "HiDreamImageTransformer2DModel": "hidden_states decides it, which changes at every call",
    "LTX2VideoDiffusionDecoderModel": "no argument is the timestep",
    "UVit2DModel": "no argument is the timestep",
}
"""Class -> part of the sentence with which it is refused or left to the whole model."""


def test_every_class_is_specified() -> None:
    specified = {*EXPORTED, *NOT_TRIED, *(tiny.class_name for tiny in TINY.values())}
    assert sorted(set(exported_classes()) - specified) == []


def test_the_page_has_the_outcome_of_every_class() -> None:
    found: dict[str, Any] = json.loads(PAGE.read_text())["exported"]
    assert set(found) == set(EXPORTED)
    inexact = {name: numbers["said"] for name, numbers in found.items() if numbers["said"] or numbers["difference"]}
    assert set(inexact) == set(NOT_EXACT)
    for name, sentence in NOT_EXACT.items():
        assert sentence in inexact[name]


QUICK = ["Transformer2DModel", "CogView3PlusTransformer2DModel", "UVit2DModel"]


# torch says the first of a tiny model's empty weight. The second is a sentence about bytes and changes no number.
@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors is a no-op", "ignore:1 hoisted weights stay in memory"
)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.exhaustive) for n in sorted(EXPORTED)]
)
def test_a_class_is_exact_or_says_why_not(name: str) -> None:
    found = outcome(name)
    if name in NOT_EXACT:
        assert NOT_EXACT[name] in found.said
    else:
        assert found.difference == 0.0 and found.said == "" and found.programs >= 1
