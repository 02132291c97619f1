"""MODULE:FACTORY: what it makes, and one sentence for each way in which it does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fusion_compile._factory import FactoryError, call_factory, described

MODULE = """
def alone(): return abs
def with_args(): return abs, (1,)
def with_list(): return abs, [1]
def with_names(): return abs, (1,), {"x": 2}
def with_calls(): return abs, (1,), {}, [(2,), abs]
class Maker:
    @staticmethod
    def step(): return abs
def pair_of_numbers(): return 1, 2
def four(): return 1, 2, 3, 4
def five(): return 1, 2, 3, 4, 5
def failing(): raise ValueError("the factory's own")
number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_here.py").write_text(MODULE)
    (tmp_path / "needs_more.py").write_text("import no_such_module_within")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "made_here", raising=False)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("alone", (abs, (), {}, ())),
        ("with_args", (abs, (1,), {}, ())),
        ("with_list", (abs, (1,), {}, ())),
        ("with_names", (abs, (1,), {"x": 2}, ())),
        ("with_calls", (abs, (1,), {}, ((2,), abs))),
        ("Maker.step", (abs, (), {}, ())),
    ],
)
def test_a_factory_of_the_working_directory_is_called(name: str, made: object) -> None:
    assert call_factory(f"made_here:{name}") == made


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("made_here", "'made_here' is not MODULE:FACTORY, as in train:make_step."),
        (":alone", "':alone' is not MODULE:FACTORY, as in train:make_step."),
        (
            "nowhere:f",
            "nowhere:f: module 'nowhere' cannot be imported: there is none here or on the import path, nor a file "
            "nowhere:f.",
        ),
        (
            "made_here:nothing",
            "made_here:nothing: made_here has no function 'nothing'; give one that takes no arguments.",
        ),
        (
            "made_here:number",
            "made_here:number: made_here has no function 'number': it is a int; give a function that takes no "
            "arguments.",
        ),
        (
            "made_here:pair_of_numbers",
            "made_here:pair_of_numbers returned (int, int); it must return an object, (object, args), (object, args, "
            "kwargs) or (object, args, kwargs, calls), with a tuple, a dictionary and a list of calls.",
        ),
        (
            "made_here:four",
            "made_here:four returned (int, int, int, int); it must return an object, (object, args), (object, args, "
            "kwargs) or (object, args, kwargs, calls), with a tuple, a dictionary and a list of calls.",
        ),
        (
            "made_here:five",
            "made_here:five returned (int, int, int, int, int); it must return an object, (object, args), (object, "
            "args, kwargs) or (object, args, kwargs, calls), with a tuple, a dictionary and a list of calls.",
        ),
    ],
)
def test_a_name_without_a_factory_is_refused(target: str, said: str) -> None:
    with pytest.raises(FactoryError) as refused:
        call_factory(target)
    assert str(refused.value) == said


def test_errors_inside_the_module_and_the_factory_pass_through() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module_within"):
        call_factory("needs_more:f")
    with pytest.raises(ValueError, match="the factory's own") as raised:
        call_factory("made_here:failing")
    assert not isinstance(raised.value, FactoryError)


def test_a_value_is_described_by_its_types() -> None:
    assert (described(3), described((3, "x"))) == ("int", "(int, str)")
