"""A step saves and loads its whole state, and refuses when it is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.small_models import batches, bits, compiled, mlp


def test_a_folder_brings_back_weights_moments_and_counts(tmp_path: Path) -> None:
    step, (first, second) = compiled(mlp(), mode="eager"), batches(2)
    step(*first)
    step.save(tmp_path)
    went_on = step(*second)
    again = compiled(mlp(), mode="eager")
    again.load(tmp_path)
    assert again.steps_called == 1 and torch.equal(again(*second), went_on)
    assert bits(again) == bits(step)
    warm = compiled(mlp(), mode="eager", optimizer="lion").warm_start(tmp_path)
    assert warm.carried
    step.release()
    with pytest.raises(RuntimeError, match="was released"):
        step.save(tmp_path)


def test_a_program_is_saved_only_where_one_was_compiled(tmp_path: Path) -> None:
    uncompiled = compiled(mlp(), mode="eager", backend="inductor")
    with pytest.raises(ValueError, match=r"is compiled by Inductor, and mode='eager' uses none"):
        uncompiled.save_program(tmp_path / "program")
    with pytest.raises(ValueError, match=r"and backend='aot_eager' uses none"):
        compiled(mlp()).save_program(tmp_path / "program")
    with pytest.raises(ValueError, match="no program to save before its first call"):
        compiled(mlp(), backend="inductor").save_program(tmp_path / "program")
    assert not (tmp_path / "program").exists()


def test_a_program_is_asked_for_before_the_first_call(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backend='aot_eager' uses none; leave out one of both"):
        compiled(mlp(), program=tmp_path)
    with pytest.raises(TypeError, match="program=3 is a int; give the folder"):
        compiled(mlp(), backend="inductor", program=3)
    with pytest.warns(UserWarning, match="holds no saved program"):
        compiled(mlp(), backend="inductor", program=tmp_path)
