"""What changed together before a recompile."""

from __future__ import annotations

from fusion_compile.explain._run.changes import Change, changes, told_together
from fusion_compile.explain._run.compilations import Compilation

FAILED = Compilation(
    "0/0", "f", "", 0, (), {}, {"x": (8, None, 4), "y": (8,), "z": (2,)}, {"lr": "0.10", "n": "3"}, {}, {}
)


def compiled(**sizes: tuple[int, ...]) -> Compilation:
    return Compilation("0/1", "f", "", 0, (), {}, {}, {}, sizes, {"lr": "0.1", "n": "4"})


def test_only_what_was_fixed_and_differs_has_changed() -> None:
    found = changes(FAILED, compiled(x=(6, 7, 5), y=(6,)))  # x's middle was free, z is not told, lr is the same number
    assert found == (
        Change("x", 0, "8", "6"),
        Change("x", 2, "4", "5"),
        Change("y", 0, "8", "6"),
        Change("n", None, "3", "4"),
    )


def test_numbers_are_told_with_the_digits_that_matter() -> None:
    failed = Compilation("0/0", "f", "", 0, (), {}, {}, {"lr": "0.1", "n": "123456789"}, {}, {})
    again = Compilation("0/1", "f", "", 0, (), {}, {}, {}, {}, {"lr": "0.09000000000000001", "n": "123456790"})
    assert [(c.before, c.now) for c in changes(failed, again)] == [("0.1", "0.09"), ("123456789", "123456790")]


def test_the_same_change_of_several_inputs_is_told_once() -> None:
    told = told_together(changes(FAILED, compiled(x=(6, 7, 5), y=(6,))))
    assert [(name, words.kind, words.op) for name, words in told] == [
        ("x", "dynamic_shape", "x.shape[0], y.shape[0]"),
        ("x", "dynamic_shape", "x.shape[2]"),
        ("n", "python_scalar", "n"),
    ]
    assert "mark_dynamic(x, 0) and torch._dynamo.mark_dynamic(y, 0)" in told[0][1].remedy
