"""Every recipe: a step captured by running computes the bits of one captured by reading."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fusion_compile as fc
from tests.dit_problem import batch, loss_fn, small_dit
from tests.small_models import bits, differing

RECIPES = [
    pytest.param(name, marks=() if name == "adamw" else pytest.mark.exhaustive, id=name) for name in fc.optim.RECIPES
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_run_is_read_bit_for_bit(recipe: str) -> None:
    found = []
    for capture in ("read", "run"):
        step = fc.compile_training_step(small_dit(), loss_fn, optimizer=recipe, capture=capture, backend="aot_eager")
        for i in (1, 2, 3):
            step(*batch(i))
        assert {program.captured_by for program in step.programs} == {capture}
        found.append(bits(step))
    assert differing(*found) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", list(fc.optim.RECIPES))
def test_inductor_makes_as_many_kernels_of_both(recipe: str) -> None:
    from torch._inductor.utils import run_and_get_code

    kernels, losses = [], []
    for capture in ("read", "run"):
        torch.compiler.reset()
        step = fc.compile_training_step(small_dit(), loss_fn, optimizer=recipe, capture=capture)
        _, code = run_and_get_code(step, *batch(1))
        kernels.append(_calls(code))
        losses.append(torch.stack([step(*batch(i)).clone() for i in (2, 3)]))
    assert kernels[0] == kernels[1]
    # Kernels of another fusion may round in another order.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def _calls(code: list[str]) -> int:
    body = "\n".join(code).partition("def call(")[2]
    return len(re.findall(r"^\s+(?:cpp_fused\w*|extern_kernels\.\w+|torch\.ops\.\S+)\(", body, re.MULTILINE))


@pytest.mark.parametrize("capture", ["read", "run"])
def test_a_way_that_is_asked_for_is_taken(capture: Any) -> None:
    step = fc.compile_training_step(small_dit(), loss_fn, capture=capture, backend="aot_eager")
    step(*batch(1))
    assert step.programs[0].captured_by == capture
