"""The command: what it prints and writes, and its exit status as a gate."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest

from fusion_compile.cli import main

FACTORIES = """
import torch
import fusion_compile as fc
from torch import nn

def good():
    return nn.Linear(4, 2), (torch.randn(3, 4),)

def breaking():
    def program(x, lr=0.1):
        if x.sum() > 0:
            x = x * 2
        return torch.linalg.eigh(x @ x.T)[0]
    return program, (torch.randn(3, 3),), {}

def named():
    def program(x, *, scale):
        return x * scale
    return program, (torch.ones(2),), {"scale": torch.tensor(2.0)}

def step():
    step = fc.compile_training_step(nn.Linear(4, 2), lambda m, x: m(x).square().mean(), optimizer="adamw",
                                    backend="aot_eager")
    step(torch.randn(3, 4))
    return step

def exported():
    return torch.export.export(nn.Linear(4, 2), (torch.randn(3, 4),), strict=False)

def wrong():
    return 1, 2

def failing():
    raise RuntimeError("the factory's own")

def modes():
    model = nn.Dropout(0.1)
    x = torch.ones(4)
    return model, (x,), {}, [model.eval, (x,)]

def ends_with_a_function():
    model = nn.Dropout(0.1)
    return model, (torch.ones(4),), {}, [model.eval]

number = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_of_the_test.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "factories_of_the_test", raising=False)
    return tmp_path


def explain(factory: str, *options: str) -> int:
    return main(["explain", f"factories_of_the_test:{factory}", *options])


def test_a_good_program_passes_every_gate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = "graph_break,recompile,host_sync,capture_unsafe,cudagraph_skip"
    assert explain("good", "--fail-on", kinds, "--json", "good.json", "--device", "h200") == 0
    assert "Linear, 1 graph" in capsys.readouterr().out
    written = json.loads((folder / "good.json").read_text())
    assert written["environment"]["roofline"].startswith("h200")
    assert written["runtime"] is not None


def test_what_is_gated_fails_with_the_findings_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("breaking", "--fail-on", "capture_unsafe", "--steps", "0") == 1
    said = capsys.readouterr().err
    assert said.startswith("failed on capture_unsafe:") and "factories_of_the_test.py:13: " in said
    assert explain("breaking", "--steps", "0") == 0  # nothing is gated


def test_every_watched_call_has_the_keywords_of_the_factory(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("named", "--steps", "3", "--fail-on", "recompile") == 0
    assert "recompiles: 0" in capsys.readouterr().out


def test_further_calls_of_the_factory_are_made_in_place_of_repeated_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("modes", "--fail-on", "recompile") == 1
    assert "recompiles: 1" in capsys.readouterr().out
    assert explain("modes", "--steps", "0", "--fail-on", "recompile") == 0  # nothing is run


def test_a_graph_break_is_gated_under_its_cause_and_under_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("breaking", "--fail-on", "graph_break", "--steps", "1") == 1
    assert "graph_break" in capsys.readouterr().err


def test_steps_and_exported_programs_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("step", "--html", "step.html") == 0
    assert explain("exported") == 0
    out = capsys.readouterr().out
    assert "TrainingStep(adamw" in out and "ExportedProgram" in out
    assert (folder / "step.html").stat().st_size > 1000


def test_diff_fails_on_new_findings_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    explain("good", "--steps", "0", "--json", "a.json")
    explain("breaking", "--steps", "0", "--json", "b.json")
    assert main(["diff", "a.json", "b.json", "--html", "d.html"]) == 1
    assert "1 finding new" in capsys.readouterr().out
    assert main(["diff", "b.json", "a.json"]) == 0
    assert (folder / "d.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "factories_of_the_test"], "is not MODULE:FACTORY"),
        (["explain", "no_such_module_here:f"], "module 'no_such_module_here' cannot be imported"),
        (["explain", "factories_of_the_test:nothing"], "has no function 'nothing'"),
        (["explain", "factories_of_the_test:number"], "is a int; give a function"),
        (["explain", "factories_of_the_test:wrong"], "returned (int, int); it must return"),
        (["explain", "factories_of_the_test:good", "--device", "abacus"], "--device abacus has no published peaks"),
        (
            ["explain", "factories_of_the_test:good", "--fail-on", "graph_breaks"],
            "--fail-on names graph_breaks, which no",
        ),
        (["explain", "factories_of_the_test:good", "--steps", "-1"], "--steps -1 is not a number of calls"),
        (["explain", "factories_of_the_test:ends_with_a_function"], "Module.eval as the last of calls"),
        (["diff", "a.json", "b.json"], "a.json"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_error_of_the_factory_is_the_factorys() -> None:
    with pytest.raises(RuntimeError, match="the factory's own"):
        explain("failing")


def test_the_command_is_declared_and_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["fusion-compile"] == "fusion_compile.cli:main"
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert "explain" in out and "diff" in out
    with pytest.raises(SystemExit) as done:
        main(["explain"])
    assert done.value.code == 2
