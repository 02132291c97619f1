"""The sources as data: every file with its module's name, and what each imports. Read by the house rules and counts."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]


class Source(NamedTuple):
    """One file: its module's name, whether it is an `__init__.py`, its path in the tree and its text."""

    module: str
    is_package: bool
    path: str
    text: str

    def __str__(self) -> str:
        return self.path


class Import(NamedTuple):
    """One imported name: `fusion_compile._types.Tensors` at line 3, one dot (`level`) for ``from .x import y``."""

    name: str
    line: int
    level: int


def read(path: Path) -> Source:
    """The file with its module's name as installed: `passes/x.py` is `fusion_compile.passes.x`."""
    where = path.relative_to(ROOT)
    parts = list(where.with_suffix("").parts)
    is_package = parts[-1] == "__init__"
    if is_package:
        parts.pop()
    if parts[0] == "passes":
        parts.insert(0, "fusion_compile")
    return Source(".".join(parts), is_package, where.as_posix(), path.read_text(encoding="utf-8"))


def python_files(*folders: str) -> list[Path]:
    """Sorted, without what lies behind links: `passes/` is read once, under its own path."""
    found = []
    for folder in folders:
        for here, _, names in os.walk(ROOT / folder):
            found += [Path(here) / name for name in names if name.endswith(".py")]
    return sorted(found)


PACKAGE = [read(path) for path in python_files("fusion_compile", "passes")]
TESTS = [read(path) for path in python_files("tests")]
EVERYTHING = PACKAGE + TESTS + [read(path) for path in python_files("examples", "benchmarks")]
MODULES = {source.module for source in PACKAGE}


@cache
def tree(source: Source) -> ast.Module:
    return ast.parse(source.text)


def imports(source: Source) -> Iterator[Import]:
    """Every import, also inside functions and under TYPE_CHECKING, as absolute dotted names."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, 0)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = source.module.split(".")
                here = here[: len(here) - node.level + source.is_package]
                base = ".".join([*here, base] if base else here)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, node.level)


def module_of(name: str, modules: set[str] = MODULES) -> str:
    """`fusion_compile._types.Tensors` -> `fusion_compile._types`: the longest known module it begins with."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")
