"""Runs on fake tensors are written down operator by operator, with the numbers that go in."""

from __future__ import annotations

import pytest
import torch

from fusion_compile._capture.numbers.number_runs import run_plain, run_symbolic, same_log
from tests.capture.counting_program import Counting, counted


def restore() -> None:
    pass


def test_a_symbolic_run_is_the_plain_run_with_expressions() -> None:
    model = Counting(counted(lambda m, h: h * (m.n / 4)), n=0)
    plain = run_plain(model.run_on_fakes, model.slots(), [0], restore)
    other = run_plain(model.run_on_fakes, model.slots(), [5], restore)
    symbolic = run_symbolic(model.run_on_fakes, model.slots(), [0], restore)
    assert same_log(symbolic.log, plain.log, [0]) and same_log(symbolic.log, other.log, [5])
    assert not same_log(symbolic.log, plain.log, [5]) and not same_log(plain.log, other.log, [0])
    assert [e(()) for e in plain.after if e is not None] == [1]
    assert [str(e) for e in symbolic.after] == ["model.n + 1"]
    assert {str(e) for e, _ in symbolic.operands} == {"(model.n + 1) / 4"}
    assert model.n == 0


def test_constant_tensors_are_compared_by_content() -> None:
    model = Counting(lambda m, h: h * torch.tensor([1.0, 2.0, float(m.n)]), n=0)
    one, two = (run_plain(model.run_on_fakes, model.slots(), [n], restore) for n in (1, 2))
    assert not same_log(one.log, two.log, [1])


def test_errors() -> None:
    model = Counting(lambda m, h: h * [1.0, 2.0][m.n], n=0)
    later = run_plain(model.run_on_fakes, model.slots(), [2], restore)
    assert later.error == "IndexError: list index out of range"
    vars(model)["n"] = 2
    with pytest.raises(IndexError):
        run_plain(model.run_on_fakes, model.slots(), [2], restore)
    symbolic = run_symbolic(model.run_on_fakes, model.slots(), [0], restore)
    assert symbolic.error == "IndexError: list index out of range"
    assert symbolic.error_at.startswith(__file__)


def test_sizes_are_told_from_operands() -> None:
    model = Counting(lambda m, h: h.sum() + torch.zeros(m.n).sum() + m.k, n=3, k=2)
    run = run_symbolic(model.run_on_fakes, model.slots(), [0, 1], restore)
    assert list(run.sized) == [0]
    assert {str(e) for e, _ in run.operands} == {"model.k"}
