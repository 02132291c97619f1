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
from tests.gpu_program.generated_programs import Row, batch_inputs, table, written, wrong_with

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


def good(key: str, optimizer: str | Transform, dtype: torch.dtype, **options: str) -> Generated:
    step = fc.compile_training_step(mixed(dtype), ridge_loss, optimizer=optimizer, backend="eager", **options)
    step(*mixed_batch())
    (program,) = step.programs
    assert not step.periodic_programs
    found = written(key, program)
    wrong = wrong_with(found, batch=batch_inputs(program))
    assert not wrong, "\n".join(wrong)
    return found


@cache
def further(name: str) -> Generated:
    return good(name, FURTHER[name](None), torch.float32)


@cache
def half_precision(form: str) -> Generated:
    return good(f"bf16 weights, {form}", "adamw", torch.bfloat16, half_precision=form)


@pytest.mark.parametrize("name", FURTHER)
def test_a_further_optimizer_is_one_program_without_a_wait(name: str) -> None:
    further(name)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_weights_are_one_program_without_a_wait(form: str) -> None:
    assert "torch.bfloat16" in half_precision(form).codes[0]


def test_launches_of_further_optimizers() -> None:
    """Of a step of a small model with banks of every kind; they do not grow with the depth of a model."""
    rows = [Row(name, further(name)) for name in FURTHER]
    rows += [Row(form, half_precision(form)) for form in FORMS]
    assert_expected_inline(table(rows), """""")
