"""Every broken program yields exactly the finding that it is about, at its line; its repaired twin yields none."""

from __future__ import annotations

import functools
import importlib
import linecache
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch._dynamo

import fusion_compile as fc
from fusion_compile import cli
from fusion_compile.explain import _compat
from tests.explain import broken
from tests.explain.example import Example

NAMES = sorted(module.name for module in pkgutil.iter_modules(broken.__path__))


@pytest.fixture(params=NAMES)
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``tests/explain/broken`` under the settings that it asks for, and the command's factories of it."""
    module = importlib.import_module(f"tests.explain.broken.{request.param}")
    if getattr(module, "LIKE_TORCH_211", False):
        monkeypatch.setattr(_compat, "recomputes_untagged_backwards", lambda: False)
    with torch._dynamo.config.patch(**getattr(module, "SETTINGS", {})):
        factories = ModuleType("factories_of_the_test")
        for name in ("broken", "repaired"):
            setattr(factories, name, functools.partial(_as_the_command_takes_it, getattr(module, name)))
        monkeypatch.setitem(sys.modules, factories.__name__, factories)
        monkeypatch.setattr(cli, "explain", functools.partial(fc.explain, backend="eager"))
        yield module


def _as_the_command_takes_it(make: Callable[[], Example]) -> tuple[Any, ...]:
    fn, args, calls = make()
    return fn, args, {}, calls


def test_there_are_at_least_twenty() -> None:
    assert len(NAMES) >= 20


def test_the_broken_program_yields_its_finding_and_the_repaired_none(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Explained by the command, written, read again, and compared in both directions."""
    expected = program.EXPECTED
    files = {name: str(tmp_path / f"{name}.json") for name in ("broken", "repaired")}
    for name, file in files.items():
        gate = ["--fail-on", expected["kind"]] if name == "broken" else []
        asked = ["explain", f"factories_of_the_test:{name}", "--json", file, *gate]
        assert cli.main(asked) == (1 if gate else 0)
    broken_one, repaired = (fc.Explanation.from_json(file) for file in files.values())

    (finding,) = broken_one.findings
    file, _, line = finding.where.rpartition(":")
    assert finding.kind == expected["kind"] and finding.op == expected.get("op", finding.op)
    own = Path(str(program.__file__))
    assert Path(file) == own.with_name(expected.get("file", own.name))
    assert expected["line_contains"] in linecache.getline(file, int(line))
    assert expected.get("why_contains", "") in finding.why and expected.get("remedy_contains", "") in finding.remedy
    assert finding.op and finding.why.endswith(".") and finding.remedy.endswith(".")
    assert repaired.findings == ()

    for told in (broken_one, repaired):
        assert not any("no costs" in note for note in told.notes)
        assert all(graph.nodes and graph.memory.peak_bytes for graph in told.graphs)
    assert cli.main(["diff", files["broken"], files["repaired"]]) == 0
    assert cli.main(["diff", files["repaired"], files["broken"]]) == 1
    assert finding.why in capsys.readouterr().out
