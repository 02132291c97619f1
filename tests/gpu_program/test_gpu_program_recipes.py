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


MEASURED = [(recipe, 4) for recipe in RECIPES if recipe != "full_fusion"]


@pytest.mark.parametrize(("recipe", "depth"), MEASURED)
def test_a_recipe_is_one_program_without_a_wait(recipe: str, depth: int) -> None:
    step_of(recipe, depth)


def test_launches_by_region() -> None:
    """Library kernels + Triton kernels, at 4 blocks."""
    rows = [Row(f"{recipe} {depth}", step_of(recipe, depth)) for recipe, depth in MEASURED]
    assert_expected_inline(
        table(rows),
        """\
                    forward   backward  optimizer      state    all
adamw 4             29 + 18    52 + 83     0 + 8      1 + 0     191
lion 4              29 + 18    52 + 83     0 + 5      1 + 1     189
muon 4              29 + 19    52 + 84   105 + 44     1 + 2     336
normuon 4           29 + 19    52 + 84   123 + 88     1 + 2     398
sf_adamw 4          29 + 18    52 + 83     0 + 6      1 + 4     193
sf_normuon 4        29 + 19    52 + 83   123 + 88     1 + 13    408
soap 4              29 + 18    52 + 84    42 + 50     1 + 2     278
""",
    )
