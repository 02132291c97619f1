"""The tests' tree is the package's: where the tests of a module are, and what a test file is about, follow from names.

``fusion_compile/_state/banks.py`` is tested in ``tests/state/test_banks.py``, or in files that begin so
(``test_banks_odd_parameters.py``). What is about a whole package lies in its folder under the package's name
(``tests/optim/test_optim_laws.py``). ``passes/outline_runs.py`` in ``tests/passes/test_outline_runs.py``.
"""

from __future__ import annotations

import ast
from pathlib import PurePosixPath

from tests.house.source import Source, tree

OF_THE_REPOSITORY = {"house", "readme", "docs", "examples", "benchmarks", "snippets", "site", "installed"}
"""What files straight under tests/ may be about besides the public doors."""
WITHOUT_MIRROR = {"data", "oracles", "house", "models"}
"""Folders under tests/ that mirror nothing: recordings, float64 twins, house rules, others' models."""


def home_of_tests(module: str) -> tuple[str, str]:
    """``fusion_compile._state.banks`` -> ``("state", "banks")``: the folder below tests/ and the module's bare name."""
    *rooms, name = module.removeprefix("fusion_compile").strip(".").split(".")
    return "/".join(room.strip("_") for room in rooms), name.strip("_")


def subjects(package: list[Source]) -> dict[str, set[str]]:
    """Folder below tests/ -> the modules' bare names that tests there may be about."""
    found: dict[str, set[str]] = {"": set(OF_THE_REPOSITORY)}
    for source in package:
        folder, name = home_of_tests(source.module)
        found.setdefault(folder, set()).add(name)
        if source.is_package:
            found.setdefault(f"{folder}/{name}".strip("/"), set()).add(name)
    return found


def about(path: str, known: dict[str, set[str]]) -> str | None:
    """The bare name of the module that the test file `path` (``tests/state/test_banks_x.py``) is about, or None."""
    where = PurePosixPath(path)
    folder = "/".join(where.parts[1:-1])
    words = where.stem.removeprefix("test_")
    fitting = [name for name in known.get(folder, ()) if words == name or words.startswith(name + "_")]
    return max(fitting, key=len) if fitting else None


def strays(tests: list[Source], package: list[Source]) -> list[str]:
    """A sentence for each test file whose name leads to no module."""
    known = subjects(package)
    return [
        f"{source.path}: no module has this name; _state/banks.py is tested in tests/state/test_banks*.py."
        for source in tests
        if PurePosixPath(source.path).name.startswith("test_")
        and PurePosixPath(source.path).parts[1] not in WITHOUT_MIRROR
        and about(source.path, known) is None
    ]


def untested(tests: list[Source], package: list[Source]) -> list[str]:
    """A sentence for each module without a test file of its name. A package's own file, and a module that only declares
    names, without a function, need none."""
    known = subjects(package)
    tested = set()
    for source in tests:
        where = PurePosixPath(source.path)
        if where.name.startswith("test_") and (name := about(source.path, known)):
            tested.add(("/".join(where.parts[1:-1]), name))
    return [
        f"{source.path}: no test file is named for it; begin tests/{folder + '/' if folder else ''}test_{name}.py."
        for source in package
        if not source.is_package and any(isinstance(n, ast.FunctionDef) for n in ast.walk(tree(source)))
        for folder, name in [home_of_tests(source.module)]
        if (folder, name) not in tested
    ]
