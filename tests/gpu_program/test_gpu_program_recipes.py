"""Every recipe's step as a GPU would run it: one graph, one partition, no wait, kernels that compile, few launches."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

import pytest
import torch
from dit import DiT
from expecttest import assert_expected_inline

from fusion_compile._gpu_program.generated import Generated
from fusion_compile.optim.recipes import RECIPES
from tests.gpu_program.generated_programs import Row, batch_inputs, most_in_float64, table, written, wrong_with
from tests.gpu_program.programs import batch, step_programs

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


@cache
def step_of(recipe: str, depth: int) -> Generated:
    _, (program,) = step_programs(recipe, depth=depth)
    found = written((recipe, depth), program)
    wrong = wrong_with(found, batch=batch_inputs(program))
    print(Row(f"{recipe} {depth}", found))
    assert not wrong, "\n".join(wrong)
    assert most_in_float64(found) <= 1, "the sum of Schedule-Free's weights is one number"
    return found


OTHERS = [recipe for recipe in RECIPES if recipe != "full_fusion"]
MEASURED = [*((recipe, 4) for recipe in OTHERS), *((recipe, 8) for recipe in ("adamw", "muon", "sf_normuon"))]
MEASURED += [("adamw", 2), ("full_fusion", 2)]
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
adamw 4             29 + 15    53 + 41     0 + 7      1 + 1     147
lion 4              29 + 15    53 + 41     0 + 4      1 + 2     145
muon 4              29 + 15    53 + 27   105 + 33     1 + 4     267
normuon 4           29 + 15    53 + 27   123 + 45     1 + 4     297
sf_adamw 4          29 + 15    53 + 41     0 + 5      1 + 4     148
sf_normuon 4        29 + 15    53 + 26   123 + 46     1 + 8     301
soap 4              29 + 15    53 + 26    42 + 34     1 + 3     203
adamw 8             53 + 27    97 + 73     0 + 7      1 + 1     259
muon 8              53 + 27    97 + 48   105 + 34     1 + 4     369
sf_normuon 8        53 + 27    97 + 47   123 + 49     1 + 11    408
adamw 2             17 + 9     31 + 25     0 + 7      1 + 1      91
full_fusion 2       17 + 9     31 + 13   186 + 80     1 + 14    351
""",
    )


def test_a_whole_step_launches_less_than_the_two_graphs_of_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours has the loss, its noise and the update as well; at most ten more were asked for."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    peer = importlib.import_module("_peer_launches")
    x, y = batch()
    found = "blocks, ours, torch.compile(model)\n"
    for depth in (2, 4, 8):
        torch.manual_seed(0)
        model = DiT(input_size=8, hidden_size=128, depth=depth)
        ours, theirs = len(step_of("adamw", depth).launches), len(peer.model_launches(model, (x, torch.rand(16), y)))
        assert ours <= theirs + 10
        found += f"{depth} {ours:>4} {theirs:>4}\n"
    assert_expected_inline(
        found,
        """\
blocks, ours, torch.compile(model)
2   91  108
4  147  182
8  259  330
""",
    )
