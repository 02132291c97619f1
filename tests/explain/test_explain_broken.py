"""Every broken program yields exactly the finding that it is about, at its line; its repaired twin yields none."""

from __future__ import annotations

import importlib
import linecache
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch._dynamo

import fusion_compile as fc
from fusion_compile.explain import _compat
from tests.explain import broken

NAMES = sorted(module.name for module in pkgutil.iter_modules(broken.__path__))


@pytest.fixture(params=NAMES)
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``tests/explain/broken`` under the settings that it asks for."""
    module = importlib.import_module(f"tests.explain.broken.{request.param}")
    if getattr(module, "LIKE_TORCH_211", False):
        monkeypatch.setattr(_compat, "recomputes_untagged_backwards", lambda: False)
    with torch._dynamo.config.patch(**getattr(module, "SETTINGS", {})):
        yield module


def explained(module: ModuleType, factory: str) -> fc.Explanation:
    example = getattr(module, factory)()
    return fc.explain(example.fn, example.args, calls=example.calls, backend="eager")


def test_there_are_at_least_twenty() -> None:
    assert len(NAMES) >= 20


def test_the_broken_program_yields_its_finding(program: ModuleType) -> None:
    expected = program.EXPECTED
    (finding,) = explained(program, "broken").findings
    file, _, line = finding.where.rpartition(":")
    assert finding.kind == expected["kind"] and finding.op == expected.get("op", finding.op)
    assert Path(file) == Path(str(program.__file__)).with_name(expected.get("file", Path(str(program.__file__)).name))
    assert expected["line_contains"] in linecache.getline(file, int(line))
    assert expected.get("why_contains", "") in finding.why and expected.get("remedy_contains", "") in finding.remedy
    assert finding.op and finding.why.endswith(".") and finding.remedy.endswith(".")


def test_the_repaired_twin_yields_none(program: ModuleType) -> None:
    assert explained(program, "repaired").findings == ()
