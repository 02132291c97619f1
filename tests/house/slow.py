"""``tests/slow_tests.txt``: the tests that only `make exhaustive` runs. A line that names no test would say nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from tests.house.source import Source, tree


def stale(lines: Iterable[str], tests: list[Source]) -> list[str]:
    """A sentence for each line ``tests/x/test_y.py::Class::test_z[case]`` whose file has no such function."""
    functions = {
        (source.path, node.name)
        for source in tests
        for node in ast.walk(tree(source))
        if isinstance(node, ast.FunctionDef)
    }
    found = []
    for line in lines:
        path, _, test = line.partition("::")
        if (path, test.partition("[")[0].rpartition("::")[2]) not in functions:
            found.append(f"tests/slow_tests.txt: there is no test {line}; take the line out, or write its new name.")
    return found
