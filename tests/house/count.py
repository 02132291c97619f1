"""`make house`: the size and shape of the package in numbers, counted by imports.

python -m tests.house.count
"""

from __future__ import annotations

from functools import cache

from tests.house.rules import MAX_LINES, arrows, circles, private_functions
from tests.house.source import PACKAGE


def package_of(module: str) -> str:
    """The folder that a module lies in; a package's own file lies in it."""
    return module if any(s.module == module and s.is_package for s in PACKAGE) else module.rpartition(".")[0]


def counts() -> dict[str, object]:
    graph = arrows(PACKAGE)
    between: dict[str, set[str]] = {}
    for module, targets in graph.items():
        here = package_of(module)
        between.setdefault(here, set()).update(package_of(t) for t in targets if package_of(t) != here)

    @cache
    def floor(module: str) -> int:
        return 1 + max((floor(target) for target in graph[module]), default=0)

    rings = circles(graph)
    longest = max((count, f"{s.path}:{line} {name}") for s in PACKAGE for name, line, count in private_functions(s))
    return {
        "packages": len(between),
        "arrows between packages": sum(map(len, between.values())),
        "modules": len(graph),
        "arrows between modules": sum(map(len, graph.values())),
        "floors (longest chain of imports)": "none: there is a circle" if rings else max(map(floor, graph)),
        "circles": len(rings),
        f"files over {MAX_LINES} lines": sum(s.text.count("\n") + 1 > MAX_LINES for s in PACKAGE),
        "longest file": max((s.text.count("\n") + 1, s.path) for s in PACKAGE),
        "longest parameter list of a private function": longest,
    }


if __name__ == "__main__":
    for name, value in counts().items():
        print(f"{name:46} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
