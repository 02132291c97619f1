"""An average of the weights is kept in the kernels that update them, as a GPU would run them."""

from __future__ import annotations

from typing import Any

import pytest

import fusion_compile as fc
from fusion_compile._gpu_program.generated import Generated
from tests.gpu_program.generated_programs import batch_inputs, written, wrong_with
from tests.gpu_program.programs import step_programs

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]

KINDS = {
    "a constant decay": lambda: fc.EMA(decay=0.999),
    "a warm-up": lambda: fc.EMA(decay=0.999, warmup="ramp", update_after=2, update_every=3),
    "two profiles": lambda: fc.EMA.power(),
}


def launches(recipe: str, depth: int, kind: str | None) -> tuple[Generated, int]:
    """The written step, and how many banks it has."""
    given: dict[str, Any] = {} if kind is None else {"ema": KINDS[kind]()}
    step, (program,) = step_programs(recipe, depth=depth, **given)
    found = written((recipe, depth, kind), program)
    wrong = wrong_with(found, batch=batch_inputs(program))
    assert not wrong, "\n".join(wrong)
    return found, len(step._residence.layout.banks)


@pytest.mark.parametrize(
    ("recipe", "kind", "most"), [*(("adamw", kind, 0) for kind in KINDS), ("sf_normuon", "two profiles", 2)]
)
def test_it_adds_few_launches_and_none_a_parameter(recipe: str, kind: str, most: int) -> None:
    """Two a bank would be allowed: AdamW's only kernel takes it along."""
    added = []
    for depth in (1, 2):
        (without, banks), (found, _) = launches(recipe, depth, None), launches(recipe, depth, kind)
        added.append(len(found.launches) - len(without.launches))
        assert most <= 2 * banks
    assert added == [most, most], "depth adds parameters to the banks, and no launch to the average"
