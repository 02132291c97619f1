"""The pages on optimizers: their snippets run, their new lines exist, and each public name has its place."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim.matrix.coefficients import POLYNOMIALS
from fusion_compile.optim.matrix.newton_schulz import safe_gram_restarts
from tests.test_house import public_names

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("optimizers.md", "porting.md", "gotchas.md")


def blocks(page: str) -> list[str]:
    """A page's Python; the first block is the preamble of all others."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)


def snippets() -> list[Any]:
    return [pytest.param(page, i, id=f"{page}-{i}") for page in PAGES for i in range(1, len(blocks(page)))]


def started(page: str) -> dict[str, Any]:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(blocks(page)[0], names)
    return names


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Snippets say nothing of modes and paths; here they run in eager mode and write into a folder of the test."""
    monkeypatch.setattr(fc, "compile_training_step", functools.partial(fc.compile_training_step, mode="eager"))
    monkeypatch.setattr(optim, "as_torch_optimizer", functools.partial(optim.as_torch_optimizer, mode="eager"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("page", "at"), snippets())
def test_a_snippet_runs_and_what_it_builds_trains(page: str, at: int) -> None:
    names = started(page)
    batch = names["batch"] if "batch" in names else names["loader"][0]
    exec(blocks(page)[at], names)
    optimizer, step = names.get("optimizer"), names.get("step")
    if isinstance(optimizer, optim.Transform) and step is None:
        step = fc.compile_training_step(names["model"], names["loss_fn"], optimizer=optimizer)
        for _ in range(3):
            step(*batch)
    if step is not None:
        assert step.metrics["skipped"] == 0
    assert all(p.isfinite().all() for p in names["model"].parameters())


def new_lines() -> list[Any]:
    """Code right of the old lines that calls a factory of `optim` and is an expression as it stands."""
    found = []
    for row in re.findall(r"^\| `.*\|$", (DOCS / "porting.md").read_text(encoding="utf-8"), re.MULTILINE):
        for code in re.findall(r"`(optim\..+?)`", row.split(" | ", 1)[1]):
            if "…" not in code:
                found.append(code)
    return sorted(set(found))


@pytest.mark.parametrize("code", new_lines())
def test_a_new_line_of_the_porting_tables_is_as_it_should_be(code: str) -> None:
    ast.parse(code, mode="eval")
    made = eval(code, {"optim": optim, "torch": torch})
    assert isinstance(made, optim.Transform) or callable(made)


def test_there_are_new_lines() -> None:
    assert len(new_lines()) > 30


def test_each_transform_and_recipe_has_a_section() -> None:
    """A factory of the public names, that is, whatever is a function and no schedule or joint."""
    text = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    joints = {"chain", "named_chain", "partition", "as_torch_optimizer"}
    factories = {n for n in public_names("fusion_compile.optim") if not isinstance(getattr(optim, n), type)}
    factories -= joints | {"RECIPES", "COMPONENTS"}
    assert {n for n in factories if f"\n### `{n}`\n" not in text} == set()
    assert set(re.findall(r"^### `(\w+)`$", text, re.MULTILINE)) <= factories
    assert all(f"`{name}`" in text for name in optim.COMPONENTS)


def test_the_table_of_safe_restarts_is_what_auto_takes() -> None:
    text = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| (`"[^|]*) \| (\([^|]*) \| ([^|]*) \| ([^|]*) \|$', text, re.MULTILINE)
    told = {table: cells for first, *cells in rows for table in re.findall(r'"(\w+)"', first)}
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    safe = {table: [safe_gram_restarts(table, dtype) for dtype in dtypes] for table in POLYNOMIALS}
    assert told == {t: ["plain iterations" if r is None else str(r) for r in restarts] for t, restarts in safe.items()}


def anchors(page: str) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert links or page == "gotchas.md"
    for link in links:
        target, _, anchor = link.partition("#")
        assert not anchor or anchor in anchors(target or page), link
        assert (DOCS / (target or page)).exists(), link
