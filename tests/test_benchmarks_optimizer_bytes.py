"""The table of bytes in docs/optimizers.md: it is the command's, and no dial takes more than its source."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

import pytest

from tests.house.source import ROOT


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("optimizer_bytes")


def test_the_page_has_the_commands_table(command: Any) -> None:
    page = command.PAGE.read_text(encoding="utf-8")
    assert command.put_into(page, command.table()) == page, "run python benchmarks/optimizer_bytes.py"


def test_no_dial_takes_more_than_its_source(command: Any) -> None:
    """Of the page's numbers, which the test above counts again: half a unit of their last place."""
    page = command.PAGE.read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^\| `(.*?)` \| (.*) \|$", page.partition(command.BEGIN)[2].partition(command.END)[0], re.M)
    )
    assert rows.keys() == {row.shown for row in command.ROWS}
    for row in command.ROWS:
        adapters, dit, _ = rows[row.shown].split(" | ")
        if row.theirs is not None:
            assert float(adapters) <= row.theirs[0] + 5e-3 and float(dit) <= row.theirs[1] + 5e-3, row.shown
        if row.half_precision == "stochastic":
            assert float(dit) <= 3.1
        if row.half_precision == "exact":
            assert float(dit) <= 5.1
