"""Every recipe's step as a GPU would run it: one graph, one partition, no wait, kernels that compile, few launches."""

from __future__ import annotations

from functools import cache

import pytest
from expecttest import assert_expected_inline

from fusion_compile._gpu_program.generated import Generated
from fusion_compile.optim.recipes import RECIPES
from tests.gpu_program.generated_programs import Row, batch_inputs, table, written, wrong_with
from tests.gpu_program.programs import step_programs

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


@cache
def step_of(recipe: str, depth: int) -> Generated:
    _, (program,) = step_programs(recipe, depth=depth)
    found = written((recipe, depth), program)
    wrong = wrong_with(found, batch=batch_inputs(program))
    print(Row(f"{recipe} {depth}", found))
    assert not wrong, "\n".join(wrong)
    return found


OTHERS = [recipe for recipe in RECIPES if recipe != "full_fusion"]
MEASURED = [*((recipe, 4) for recipe in OTHERS), *((recipe, 8) for recipe in ("adamw", "muon", "sf_normuon"))]
MEASURED += [("full_fusion", 2)]
"""`full_fusion` has twice the kernels of any other, so it is written for a small model."""


@pytest.mark.parametrize(("recipe", "depth"), MEASURED)
def test_a_recipe_is_one_program_without_a_wait(recipe: str, depth: int) -> None:
    step_of(recipe, depth)


def test_launches_by_region() -> None:
    """Library kernels + Triton kernels, by blocks. The update's do not grow with the depth, but for what gathers the
    matrices of a bank."""
    rows = [Row(f"{recipe} {depth}", step_of(recipe, depth)) for recipe, depth in MEASURED]
    assert_expected_inline(
        table(rows),
        """\
                    forward   backward  optimizer      state    all
adamw 4             29 + 19    52 + 83     0 + 8      1 + 1     193
lion 4              29 + 19    52 + 83     0 + 4      1 + 2     190
muon 4              29 + 19    52 + 84   105 + 45     1 + 4     339
normuon 4           29 + 19    52 + 84   123 + 89     1 + 4     401
sf_adamw 4          29 + 19    52 + 83     0 + 6      1 + 5     195
sf_normuon 4        29 + 19    52 + 83   123 + 89     1 + 15    411
soap 4              29 + 19    52 + 84    42 + 51     1 + 3     281
adamw 8             53 + 31    96 + 151    0 + 8      1 + 1     341
muon 8              53 + 31    96 + 152  105 + 46     1 + 4     488
sf_normuon 8        53 + 31    96 + 151  123 + 89     1 + 16    560
full_fusion 2       17 + 13    30 + 49   186 + 190    1 + 23    509
""",
    )
