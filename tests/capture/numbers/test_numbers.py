"""What a changing number decides is found; its rule predicts the numbers exactly and ends where the program changes."""

from __future__ import annotations

import copy
import enum
import linecache
import logging
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._capture.numbers import _compat
from fusion_compile._capture.numbers.numbers import LARGEST, Decides, Numbers, study_numbers
from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._compat import DATA_DEPENDENT
from tests.capture.counting_program import Body, Counting, X, counted


def study(model: Counting) -> Numbers:
    before = model.values()
    found = study_numbers(model.run_on_fakes, model.slots())
    assert model.values() == before
    return found


def then(model: Any, h: Tensor, **numbers: Any) -> Tensor:
    vars(model).update(numbers)
    return h


def matched(m: Any, h: Tensor) -> Tensor:
    match m.n:
        case 7:
            return h.relu()
        case int():
            return h
    return -h


def logged(m: Any, h: Tensor) -> Tensor:
    logging.getLogger("numbers").error("step %d %s", m.n, m.n)
    return h


Case = tuple[Body, dict[str, Any], Decides, list[str], list[str]]
CASES: dict[str, Case] = {
    "unused": (counted(lambda m, h: h), {"n": 0}, "nothing", [], ["model.n + 1"]),
    "pointer": (lambda m, h: then(m, h, p=(m.p + 8) % 24), {"p": 0}, "nothing", [], ["(model.p + 8) % 24"]),
    "warm-up": (
        counted(lambda m, h: h * min(1.0, m.n / 4)),
        {"n": 0},
        "operand",
        ["((model.n + 1) / 4) < 1.0"],
        ["model.n + 1"],
    ),
    "warm-up is over": (
        counted(lambda m, h: h * min(1.0, m.n / 4)),
        {"n": 7},
        "until",
        ["not (((model.n + 1) / 4) < 1.0)"],
        ["model.n + 1"],
    ),
    "threshold": (
        counted(lambda m, h: h.relu() if m.n <= 3 else h),
        {"n": 0},
        "until",
        ["(model.n + 1) <= 3"],
        ["model.n + 1"],
    ),
    "every second": (
        counted(lambda m, h: h.relu() if m.n % 2 == 0 else h),
        {"n": 0},
        "until",
        ["not (((model.n + 1) % 2) == 0)"],
        ["model.n + 1"],
    ),
    "cosine": (
        counted(lambda m, h: h * math.cos(m.n)),
        {"n": 0},
        "operand",
        [],
        ["model.n + 1"],
    ),
    "float": (counted(lambda m, h: h * float(m.n)), {"n": 0}, "operand", [], ["model.n + 1"]),
    "int": (
        lambda m, h: then(m, h * int(m.t), t=m.t + 0.25),
        {"t": 0.5},
        "operand",
        [],
        ["model.t + 0.25"],
    ),
    "range": (counted(lambda m, h: h * sum(range(m.n))), {"n": 2}, "until", ["model.n + 1 == 3"], ["model.n + 1"]),
    "index": (
        counted(lambda m, h: h * [1.0, 2.0, 3.0, 4.0][m.n % 4]),
        {"n": 2},
        "until",
        ["(model.n + 1) % 4 == 3"],
        ["model.n + 1"],
    ),
    "isinstance": (
        counted(lambda m, h: h * 2 if isinstance(m.n, int) and m.n > 100 else h),
        {"n": 2},
        "until",
        ["not ((model.n + 1) > 100)"],
        ["model.n + 1"],
    ),
    "copied": (
        lambda m, h: then(m, h.relu() if copy.deepcopy(SimpleNamespace(n=m.n)).n > 100 else h, n=m.n + 1),
        {"n": 0},
        "until",
        ["not (model.n > 100)"],
        ["model.n + 1"],
    ),
    "in a range": (
        counted(lambda m, h: h.relu() if m.n in range(2, 4) else h),
        {"n": 0},
        "until",
        ["not ((model.n + 1) == 2)", "not ((model.n + 1) == 3)"],
        ["model.n + 1"],
    ),
    "matched": (counted(matched), {"n": 200}, "until", ["not ((model.n + 1) == 7)"], ["model.n + 1"]),
    "truth": (
        counted(lambda m, h: h if m.n else -h),
        {"n": -1},
        "until",
        ["not ((model.n + 1) != 0)"],
        ["model.n + 1"],
    ),
    "constant tensor": (
        counted(lambda m, h: h * torch.tensor([1.0, 2.0, m.n])),
        {"n": 1},
        "until",
        ["model.n + 1 == 2"],
        ["model.n + 1"],
    ),
    "dropout rate": (
        lambda m, h: then(m, torch.dropout(h, m.t, True), t=m.t * 0.5),
        {"t": 0.5},
        "until",
        ["model.t == 0.5"],
        ["model.t * 0.5"],
    ),
    "temperature": (
        lambda m, h: then(m, h / m.t, t=max(0.1, m.t * 0.9)),
        {"t": 1.0},
        "operand",
        ["(model.t * 0.9) > 0.1"],
        ["model.t * 0.9"],
    ),
    "sums of floats": (
        lambda m, h: then(m, h / m.t, t=m.t * 0.9 + 0.1 - 0.05),
        {"t": 1.0},
        "operand",
        [],
        ["((model.t * 0.9) + 0.1) - 0.05"],
    ),
    "power of a constant": (counted(lambda m, h: h * 0.5**m.n), {"n": 2}, "operand", [], ["model.n + 1"]),
    "gate": (counted(lambda m, h: h * (m.n > 5)), {"n": 3}, "operand", [], ["model.n + 1"]),
    "full": (counted(lambda m, h: h + torch.full((3,), m.n)), {"n": 3}, "operand", [], ["model.n + 1"]),
    "logged": (
        counted(logged),
        {"n": 2},
        "nothing",
        [],
        ["model.n + 1"],
    ),
    "slice": (
        lambda m, h: then(m, h[m.p : m.p + 1], p=(m.p + 1) % 2),
        {"p": 0},
        "operand",
        ["(model.p + 1) - model.p == 1", "model.p >= 0", "(model.p + 1) <= 2"],
        ["(model.p + 1) % 2"],
    ),
    "entry": (
        counted(lambda m, h: h * torch.ones(64)[m.n]),
        {"n": 3},
        "operand",
        ["(model.n + 1) >= 0", "(model.n + 1) < 64"],
        ["model.n + 1"],
    ),
    "repeat": (counted(lambda m, h: h.repeat(m.n, 1)), {"n": 3}, "size", ["model.n == 3"], ["4"]),
    "arange": (
        counted(lambda m, h: h.sum() + torch.arange(m.n).sum()),
        {"n": 3},
        "until",
        ["(model.n + 1) - 0 == 4"],
        ["model.n + 1"],
    ),
    "bool": (lambda m, h: then(m, h.relu() if m.b else h, b=not m.b), {"b": True}, "until", ["model.b"], ["False"]),
    "f-string": (counted(lambda m, h: h * len(f"{m.n}")), {"n": 8}, "unsupported", ["model.n == 8"], ["9"]),
    "key": (counted(lambda m, h: h * {1: 2.0}.get(m.n, 1.0)), {"n": 0}, "unsupported", ["model.n == 0"], ["1"]),
    "set": (counted(lambda m, h: h if m.n in {5, 6} else -h), {"n": 3}, "unsupported", ["model.n == 3"], ["4"]),
    "floor division": (
        lambda m, h: then(m, h * (m.t // 0.1), t=m.t + 0.5),
        {"t": 1.0},
        "unsupported",
        ["model.t == 1.0"],
        ["1.5"],
    ),
    "cancels": (
        lambda m, h: then(m, h * ((m.t + 0.1) - m.t), t=m.t + 0.5),
        {"t": 0.0},
        "unsupported",
        ["model.t == 0.0"],
        ["0.5"],
    ),
    "divmod": (counted(lambda m, h: h * divmod(m.n, 3)[1]), {"n": 9}, "unsupported", ["model.n == 9"], ["10"]),
    "round to tens": (counted(lambda m, h: h * round(m.n, -1)), {"n": 9}, "unsupported", ["model.n == 9"], ["10"]),
    "exact type": (
        counted(lambda m, h: h * 2 if type(m.n) is int and m.n > 3 else h),
        {"n": 2},
        "unsupported",
        ["model.n == 2"],
        ["3"],
    ),
    "text": (lambda m, h: then(m, h, w=m.w + "a"), {"w": "a"}, "unsupported", ["model.w == 'a'"], ["'aa'"]),
    "huge": (counted(lambda m, h: h), {"n": LARGEST}, "unsupported", [f"model.n == {LARGEST}"], [f"{LARGEST + 1}"]),
    "infinite": (
        lambda m, h: then(m, h, t=min(m.t, 3.0)),
        {"t": math.inf},
        "unsupported",
        ["model.t == inf"],
        ["3.0"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_number_decides(name: str) -> None:
    body, numbers, decides, conditions, after = CASES[name]
    found = study(Counting(body, **numbers))
    assert found.rule is not None
    assert [use.decides for use in found.uses] == [decides]
    assert [str(c) for c in found.rule.conditions] == conditions
    assert [str(e) for e in found.rule.after] == after


@pytest.mark.parametrize("name", CASES)
def test_the_rule_counts_as_the_program_does(name: str) -> None:
    body, numbers, *_ = CASES[name]
    model = Counting(body, **numbers)
    rule = study(model).rule
    assert rule is not None
    assert rule.holds(model.values())
    for _ in range(12):
        before = model.values()
        with torch.no_grad():
            model(X)
        if not rule.holds(before):
            break
        assert list(map(repr, rule.next(before))) == list(map(repr, model.values()))


def test_a_rule_ends_at_the_threshold_and_says_where() -> None:
    body = CASES["threshold"][0]
    found = study(Counting(body, n=0))
    assert found.rule is not None
    assert [found.rule.holds((n,)) for n in (0, 1, 2, 3, 4)] == [True, True, True, False, False]
    failed = found.rule.failed((3,))
    assert failed is not None
    path, line = failed.where.rsplit(":", 1)
    assert path == __file__ and "m.n <= 3" in linecache.getline(path, int(line))


def test_another_type_or_sign_of_zero_does_not_hold() -> None:
    rule = study(Counting(CASES["float"][0], n=0)).rule
    assert rule is not None and not rule.holds((0.0,)) and not rule.holds((True,))
    pinned = study(Counting(CASES["cancels"][0], t=0.0)).rule
    assert pinned is not None and pinned.holds((0.0,)) and not pinned.holds((-0.0,))


def test_numbers_that_meet() -> None:
    def body(m: Any, h: Tensor) -> Tensor:
        return then(m, h.relu() if m.k < m.n * 2 else h, k=m.k + m.n, n=m.n + 1, b=m.n > 3)

    found = study(Counting(body, n=0, k=5, b=False))
    assert [use.decides for use in found.uses] == ["until", "until", "until"]
    assert found.rule is not None
    assert found.rule.next((3, 9, False)) == (4, 12, False)
    assert found.rule.next((4, 9, False)) == (5, 13, True)
    assert not found.rule.holds((4, 7, False))
    assert not found.rule.holds((4, 9, True))


def test_one_number_that_cannot_be_followed_leaves_the_other_free() -> None:
    found = study(Counting(counted(lambda m, h: then(m, h.repeat(m.p + 1, 1) / m.n, p=1 - m.p)), n=1, p=0))
    assert [use.decides for use in found.uses] == ["operand", "size"]
    assert found.rule is not None and found.rule.pinned == (1,)
    assert found.rule.holds((50, 0)) and not found.rule.holds((50, 1))


def test_operands_are_expressions_of_the_numbers() -> None:
    (use,) = study(Counting(CASES["warm-up"][0], n=0)).uses
    assert {str(e) for e in use.operands} == {"(model.n + 1) / 4"}
    assert use.operands[0]((1,)) == 0.5


def test_an_enum_member_holds_for_itself_and_an_object_has_no_rule() -> None:
    phase = enum.Enum("phase", "warm cold")

    def body(m: Any, h: Tensor) -> Tensor:
        return then(m, h.relu() if m.p is phase.warm else h, p=phase.cold if m.p is phase.warm else phase.warm)

    rule = study(Counting(body, p=phase.warm)).rule
    assert rule is not None
    assert rule.holds((phase.warm,)) and not rule.holds((phase.cold,)) and rule.next((phase.warm,)) == (phase.cold,)
    found = study(Counting(counted(lambda m, h: h), n=0, o=object()))
    assert found.rule is None
    assert [use.decides for use in found.uses] == ["unsupported", "unsupported"]


def test_a_number_that_becomes_a_tensor_has_no_rule() -> None:
    found = study(Counting(lambda m, h: then(m, h, n=m.n + h.mean().detach()), n=1.0))
    assert found.rule is None
    assert [use.decides for use in found.uses] == ["unsupported"]


def test_a_list_that_becomes_shorter_has_no_rule() -> None:
    rates = [0.5, 1.0]

    def take(m: Any, h: Tensor) -> Tensor:
        return h * rates.pop(0)

    def restore() -> None:
        rates[:] = [0.5, 1.0]

    model = Counting(take)
    found = study_numbers(model.run_on_fakes, [Slot(rates, i, f"rates[{i}]") for i in range(2)], restore=restore)
    assert found.rule is None and rates == [0.5, 1.0]


def test_a_value_read_on_the_host_is_the_programs_own_error() -> None:
    model = Counting(counted(lambda m, h: then(m, h, last=h.sum().item())), n=0, last=0.0)
    with pytest.raises(DATA_DEPENDENT):
        study(model)
    assert model.values() == (0, 0.0)


def test_the_programs_own_error_passes_and_the_numbers_are_as_they_were() -> None:
    model = Counting(counted(lambda m, h: h * (1 // 0)), n=0)
    restored = []
    with pytest.raises(ZeroDivisionError):
        study_numbers(model.run_on_fakes, model.slots(), restore=lambda: restored.append(model.n))
    assert model.n == 0 and restored == [1]


def test_what_else_a_run_leaves_is_restored_after_each_run() -> None:
    kept: list[Any] = []

    def keeping(m: Any, h: Tensor) -> Tensor:
        kept.append(m.n)
        return h

    model = Counting(counted(keeping), n=0)
    assert study_numbers(model.run_on_fakes, model.slots(), restore=kept.clear).uses[0].decides == "nothing"
    assert kept == []


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unused", "model.n (0) decides nothing in the step and is counted on."),
        (
            "threshold",
            "model.n (0) decides how the step goes on (HERE); the captured step holds while `(model.n + 1) <= 3`.",
        ),
        (
            "f-string",
            "model.n (8) changes at each step, and its text is used (HERE); the captured step holds for this value "
            "alone. Keep it in a 0-dim tensor, or change it outside of the step; mode='eager' runs it as it is.",
        ),
    ],
)
def test_sentences(name: str, sentence: str) -> None:
    (use,) = study(Counting(CASES[name][0], **CASES[name][1])).uses
    assert use.sentence().replace(use.where or "nowhere", "HERE") == sentence


def test_numbers_are_unsupported_where_torch_cannot_follow_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Counting(counted(lambda m, h: h), n=0)
    monkeypatch.setattr(_compat, "why_numbers_cannot_be_followed", lambda: "this torch is another one")
    found = study_numbers(model.run_on_fakes, model.slots())
    assert found.rule is None and [use.decides for use in found.uses] == ["unsupported"]
    assert found.uses[0].sentence().startswith("model.n (0) changes at each step, and this torch is another one;")
