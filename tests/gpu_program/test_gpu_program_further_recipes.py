"""Every other complete optimizer, stored state and half-precision weights, as a GPU would run their steps."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from expecttest import assert_expected_inline

import fusion_compile as fc
from fusion_compile._gpu_program.generated import Generated
from fusion_compile._state.half_precision import FORMS
from fusion_compile.optim import Transform
from tests.gpu_program.complete_optimizers import FURTHER, mixed, mixed_batch, ridge_loss
from tests.gpu_program.generated_programs import Row, batch_inputs, most_in_float64, table, written, wrong_with

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


def good(key: str, optimizer: str | Transform, dtype: torch.dtype, form: str = "master") -> Generated:
    step = fc.compile_training_step(mixed(dtype), ridge_loss, optimizer=optimizer, backend="eager", half_precision=form)
    step(*mixed_batch())
    (program,) = step.programs
    assert not step.periodic_programs
    found = written(key, program)
    wrong = wrong_with(found, batch=batch_inputs(program))
    assert not wrong, "\n".join(wrong)
    assert most_in_float64(found) <= 1, "single numbers alone"
    return found


@cache
def further(name: str) -> Generated:
    return good(name, FURTHER[name](None), torch.float32)


@cache
def half_precision(form: str) -> Generated:
    return good(f"bf16 weights, {form}", "adamw", torch.bfloat16, form)


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_optimizer_is_one_program_without_a_wait(name: str) -> None:
    further(name)


@pytest.mark.filterwarnings("ignore:half_precision='round'.*is lost:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_one_program_without_a_wait(form: str) -> None:
    assert "torch.bfloat16" in half_precision(form).codes[0]


@pytest.mark.filterwarnings("ignore:half_precision='round'.*is lost:UserWarning")
def test_launches_of_further_optimizers() -> None:
    """Of a step of a small model with banks of every kind; they do not grow with the depth of a model."""
    rows = [Row(name, further(name)) for name in FURTHER]
    rows += [Row(form, half_precision(form)) for form in FORMS]
    assert_expected_inline(
        table(rows),
        """\
                    forward   backward  optimizer      state    all
adakaon              2 + 4      5 + 2      0 + 21     0 + 2      36
nekaon               2 + 5      5 + 3      0 + 20     0 + 1      36
adapnm               2 + 3      5 + 2      0 + 22     0 + 1      35
adamuon              2 + 5      5 + 2     18 + 21     0 + 1      54
adamuon_sign         2 + 3      5 + 6     15 + 14     0 + 3      48
adafactor            2 + 3      5 + 3      0 + 16     0 + 2      31
prodigy              2 + 2      5 + 7      0 + 6      0 + 3      25
mechanic of adamw    2 + 1      5 + 6      0 + 12     0 + 2      28
kempner_muon         2 + 2      5 + 6     15 + 12     0 + 2      44
kempner_sf_adamw     2 + 1      5 + 7      0 + 5      0 + 3      23
adamw, bf16, int8    2 + 1      5 + 6      0 + 9      0 + 2      25
lion, 4bit           2 + 2      5 + 7      0 + 9      0 + 0      25
normuon, int8        2 + 4      5 + 5     18 + 21     0 + 2      57
master               2 + 2      5 + 7      0 + 7      0 + 1      24
exact                2 + 2      5 + 7      0 + 7      0 + 1      24
kahan                2 + 2      5 + 7      0 + 7      0 + 1      24
stochastic           2 + 1      5 + 7      0 + 7      0 + 1      23
round                2 + 2      5 + 7      0 + 7      0 + 1      24
""",
    )
