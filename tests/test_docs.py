"""The pages and docstrings keep their word: links lead somewhere, new lines of the porting tables exist, each factory
has a section, and each exported function says what it takes and returns.

That their snippets run is in ``test_snippets.py``, that the site builds and works in ``test_site.py``.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim.matrix.coefficients import POLYNOMIALS
from fusion_compile.optim.matrix.newton_schulz import safe_gram_restarts
from tests.test_house import PUBLIC_PACKAGES, public_names

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


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
    joints = {"chain", "named_chain", "partition", "as_torch_optimizer", "create", "register"}
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


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def links_of(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What GitHub, and the site, make of a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        where = (page.parent / target).resolve() if target else page
        assert where.is_relative_to(ROOT) and where.exists(), link
        assert not anchor or anchor in anchors(where), link


def test_there_are_links() -> None:
    assert sum(len(links_of(page)) for page in PAGES) > 100


def where_is_it() -> dict[str, tuple[Path, list[str]]]:
    """The table of CONTRIBUTING.md: question -> the file, and the names that are said to be there."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## Where is it\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]*\?) \| \[[^]]*\]\(([^)]*)\)[^|]*\| (.*) \|$", section, re.MULTILINE)
    return {question: (ROOT / path, re.findall(r"`(\w+)`", names)) for question, path, names in rows}


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("where would I add a new optimizer?", "RECIPES"),
        ("where is the non-finite skip?", "skip_nonfinite"),
        ("who decides what is hoisted?", "choose_residuals"),
    ],
)
def test_a_newcomer_finds_it_in_two_clicks_from_the_readme(question: str, name: str) -> None:
    assert "CONTRIBUTING.md#where-is-it" in links_of(ROOT / "README.md")
    file, names = where_is_it()[question]
    assert names[0] == name
    defines = rf"^\s*(?:def |if options\.)?{name}\b"  # a function, an assignment, or the branch on an option
    assert re.search(defines, file.read_text(encoding="utf-8"), re.MULTILINE), f"{file} no longer has {name}."


def test_what_is_said_to_be_in_a_file_is_in_it() -> None:
    table = where_is_it()
    assert len(table) > 6
    for file, names in table.values():
        words = set(re.findall(r"\w+", "".join(path.read_text("utf-8") for path in file.parent.glob("*.py"))))
        assert set(names) <= words or file.suffix == ".md", (file, names)


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/-]+\.md", text.partition("\nnav:\n")[2]))
    assert named == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


# -- docstrings of what is exported ------------------------------------------------------------------------------------


def entries(doc: str, section: str) -> list[str] | None:
    """What a section of a docstring names, one entry at each line of its least indent; None without the section."""
    found = re.search(rf"^{section}:\n((?:(?: .*)?\n)*(?: .*)?)", doc, re.MULTILINE)
    lines = [line for line in found[1].splitlines() if line] if found else []
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    tops = [line[indent:] for line in lines if not line[indent:].startswith(" ")]
    return [re.split(r"(?: \(.*?\))?:(?: |$)", top)[0] for top in tops] if found else None


def lacking(function: Callable[..., Any], example: bool) -> list[str]:
    """What the docstring of `function` does not say of its parameters and result, in sentences."""
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    takes = [
        str(p).partition(":")[0].partition("=")[0].strip()
        for n, p in signature.parameters.items()
        if n not in ("self", "cls")
    ]
    named = [name.strip(" `") for entry in entries(doc, "Args") or [] for name in entry.split(",")]
    said = [f"Args names {named} and the function takes {takes}"] if sorted(named) != sorted(takes) else []
    gives = entries(doc, "Returns") or entries(doc, "Yields")
    if signature.return_annotation not in ("None", None) and not gives:
        said.append("Returns is missing")
    if example and not any(">>> " in line for line in (entries(doc, "Example") or [])):
        said.append("Example is missing")
    return said


def public_functions() -> dict[str, tuple[Callable[..., Any], bool]]:
    """By full name: each exported function, which has an example, and each public method of an exported class."""
    found: dict[str, tuple[Callable[..., Any], bool]] = {}
    for package in PUBLIC_PACKAGES:
        for name in public_names(package):
            value = getattr(importlib.import_module(package), name)
            if inspect.isfunction(value):
                found[f"{package}.{name}"] = (value, True)
            for key, member in members_of(value) if isinstance(value, type) else ():
                if inspect.isfunction(function := getattr(member, "__func__", member)) and not key.startswith("_"):
                    found[f"{package}.{name}.{key}"] = (function, False)
    return found


def members_of(kind: type) -> list[tuple[str, Any]]:
    """What an exported class has itself. A training step is put together from parts, which are public with it."""
    own = [b for b in reversed(kind.__mro__) if b is kind or b.__module__.startswith("fusion_compile._step.")]
    return [*{key: member for base in own for key, member in vars(base).items()}.items()]


PUBLIC = public_functions()


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_says_what_a_function_takes_and_returns(name: str) -> None:
    assert lacking(*PUBLIC[name]) == []


def test_there_are_exported_functions_and_methods() -> None:
    assert {"fusion_compile.compile_training_step", "fusion_compile.TrainingStep.save"} <= PUBLIC.keys()
    assert len(PUBLIC) > 80


def test_a_docstring_that_says_too_little_or_too_much_is_seen() -> None:
    def silent(x: int, *rest: int) -> int:
        return x

    def wrapped_badly(x: int) -> None:
        """Wrapped badly.

        Args:
            x: A number that is longer
            than its line.

        Example:
            >>> wrapped_badly(1)
        """

    names = "Args names [] and the function takes ['x', '*rest']"
    assert lacking(silent, True) == [names, "Returns is missing", "Example is missing"]
    assert lacking(wrapped_badly, True) == ["Args names ['x', 'than its line.'] and the function takes ['x']"]
