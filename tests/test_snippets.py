"""Every Python block of docs/, of the README and of the package's docstrings runs, as a reader would run it.

The blocks of a page are one session: each runs after those above it. On the pages of `AFTER_THE_FIRST` each runs after
the first one only. A block that cannot run here says so on the page itself, in the line before it: ``*Not run: why.*``
"""

from __future__ import annotations

import doctest
import functools
import importlib
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import fusion_compile as fc
from fusion_compile import optim
from tests.house.source import PACKAGE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
AFTER_THE_FIRST = {"docs/gotchas.md", "docs/optimizers.md", "docs/porting.md"}
RUN_ELSEWHERE = {"docs/explain.md": "tests/explain/test_explain_docs.py"}
"""Pages whose blocks run between shell commands, in a test of their own."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in version:FutureWarning"),  # diffusers
    pytest.mark.filterwarnings("ignore:.*the sampler is built again"),  # what docs/howto/lora.md says
]


class Block(NamedTuple):
    """One fenced block of Python: its text, the line it begins at, and why it is not run, or ""."""

    code: str
    line: int
    not_run: str


def python_blocks(text: str) -> list[Block]:
    """The fenced blocks of Python of a page's text, in order."""
    found = []
    for match in re.finditer(r"^```python[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        before = text[: match.start()].rstrip("\n").rpartition("\n")[2]
        reason = re.fullmatch(r"\*Not run: (.+)\*", before)
        found.append(Block(match[1], text[: match.start(1)].count("\n") + 1, reason[1] if reason else ""))
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


BLOCKS = {name_of(page): python_blocks(page.read_text(encoding="utf-8")) for page in PAGES}


def sessions() -> list[Any]:
    """Page and the indices of the blocks that run one after the other."""
    found = []
    for page, blocks in BLOCKS.items():
        runnable = [i for i, block in enumerate(blocks) if not block.not_run]
        if not runnable or page in RUN_ELSEWHERE:
            continue
        if page in AFTER_THE_FIRST:
            found += [pytest.param(page, [0, i], id=f"{page}:{blocks[i].line}") for i in runnable[1:]]
        else:
            found.append(pytest.param(page, runnable, id=page))
    return found


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages say nothing of modes and paths; here they run in eager mode and write into a folder of the test."""
    for module, name in ((fc, "compile_training_step"), (fc, "optimize_sampler"), (optim, "as_torch_optimizer")):
        monkeypatch.setattr(module, name, functools.partial(getattr(module, name), mode="eager"))
    monkeypatch.chdir(tmp_path)


def run(code: str, page: str, line: int, names: dict[str, Any]) -> None:
    """Run a block with the page's own lines in a traceback, and three rounds where the page has fifty."""
    exec(compile("\n" * (line - 1) + code.replace("range(50)", "range(3)"), page, "exec"), names)


@pytest.mark.parametrize(("page", "session"), sessions())
@pytest.mark.usefixtures("uncompiled")
def test_a_page_runs(page: str, session: list[int]) -> None:
    names: dict[str, Any] = {"__name__": "a_page"}
    for at in session:
        block = BLOCKS[page][at]
        run(block.code, page, block.line, names)
    if page in AFTER_THE_FIRST:
        what_it_builds_trains(names)


WITH_EXAMPLES = [source.module for source in PACKAGE if ">>> " in source.text]


@pytest.mark.parametrize("module", WITH_EXAMPLES)
@pytest.mark.usefixtures("uncompiled")
def test_the_examples_of_docstrings_give_what_they_say(module: str) -> None:
    tests = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module), module)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        # Dynamo keeps names of its own among the globals of what it has seen, and takes them out itself.
        runner.run(test, out=said.append, clear_globs=False)
    assert sum(len(test.examples) for test in tests) > 0
    assert said == [], "".join(said)


def what_it_builds_trains(names: dict[str, Any]) -> None:
    """An `optimizer` that a block makes takes three steps; weights stay finite and no step is skipped."""
    batch = names["batch"] if "batch" in names else names["loader"][0]
    optimizer, step = names.get("optimizer"), names.get("step")
    if isinstance(optimizer, optim.Transform) and step is None:
        step = fc.compile_training_step(names["model"], names["loss_fn"], optimizer=optimizer)
        for _ in range(3):
            step(*batch)
    if step is not None:
        assert step.metrics["skipped"] == 0
    assert all(p.isfinite().all() for p in names["model"].parameters())


def test_there_are_pages_with_blocks_and_each_reason_is_said() -> None:
    assert sum(len(blocks) for blocks in BLOCKS.values()) > 60
    assert {page for page, blocks in BLOCKS.items() if blocks} >= {"README.md", "docs/quickstart.md", *AFTER_THE_FIRST}
    assert all((ROOT / test).exists() and BLOCKS[page] for page, test in RUN_ELSEWHERE.items())


def test_a_block_that_says_why_it_is_not_run_is_not_run() -> None:
    first, second = python_blocks("*Not run: it needs a GPU.*\n\n```python\n1 / 0\n```\ntext\n```python\nx = 1\n```\n")
    assert first.not_run == "it needs a GPU." and second == Block("x = 1\n", 8, "")


def test_an_error_has_the_line_of_the_page(tmp_path: Path) -> None:
    (block,) = python_blocks("# Title\n\n```python\nx = 1\n1 / 0\n```\n")
    with pytest.raises(ZeroDivisionError) as error:
        run(block.code, "page.md", block.line, {})
    assert error.traceback[-1].lineno + 1 == 5


def test_the_quickstart_has_the_readmes_example() -> None:
    assert BLOCKS["docs/quickstart.md"][0].code == BLOCKS["README.md"][0].code


def test_the_readmes_example_gives_finite_samples(uncompiled: None) -> None:
    names: dict[str, Any] = {"__name__": "a_page"}
    run(BLOCKS["README.md"][0].code, "README.md", BLOCKS["README.md"][0].line, names)
    assert names["samples"].shape == names["x"].shape
    assert torch.isfinite(names["samples"]).all()
    assert names["loss"].ndim == 0
