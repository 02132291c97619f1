"""The house rules. Each is a function from one source to sentences, so that it can be shown a planted violation."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator

from tests.house import source as sources
from tests.house.rooms import MAY_IMPORT, STRANGERS, room_of
from tests.house.source import Source, imports, module_of, tree, within

MAX_LINES = 400
MAX_TEST_LINES = 500
MAX_PARAMETERS = 8
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "core", "manager"}

Rule = Callable[[Source], list[str]]


def a_room_imports_what_it_may(source: Source) -> list[str]:
    here = room_of(source.module)
    if here is None:
        return [f"{source.path}: {source.module} lies in no room; add its room to MAY_IMPORT in tests/house/rooms.py."]
    said = []
    for name, line, _ in imports(source):
        target = module_of(name, sources.MODULES)
        there = room_of(target) if within(target, "fusion_compile") else None
        if there is not None and there != here and there not in MAY_IMPORT[here].split():
            said.append(
                f"{source.path}:{line}: {here} may import {MAY_IMPORT[here] or 'nothing of ours'}, not {target}."
            )
    return said


def strangers_never_meet(source: Source) -> list[str]:
    pairs = STRANGERS + [(b, a) for a, b in STRANGERS]
    return [
        f"{source.path}:{line}: {a} and {b} never import each other."
        for name, line, _ in imports(source)
        for a, b in pairs
        if within(source.module, a) and within(module_of(name, sources.MODULES), b)
    ]


def passes_know_torch_and_themselves(source: Source) -> list[str]:
    if not within(source.module, "fusion_compile.passes"):
        return []
    said = []
    for name, line, level in imports(source):
        if level > 1:
            said.append(f"{source.path}:{line}: inside passes/ a relative import has one dot.")
        elif level == 0 and name.partition(".")[0] not in {"torch", *sys.stdlib_module_names}:
            said.append(f"{source.path}:{line}: imports {name}; passes/ knows torch and, by relative imports, itself.")
    return said


def nobody_imports_bare_passes(source: Source) -> list[str]:
    return [
        f"{source.path}:{line}: `passes` from the top of the tree is a second copy with other classes; "
        "import fusion_compile.passes."
        for name, line, level in imports(source)
        if level == 0 and within(name, "passes")
    ]


def _is_private_torch(name: str) -> bool:
    """`torch._dynamo`, `torch.utils._pytree.tree_map`; not `torch.__version__` or an operator, `torch.ops.aten._x`."""
    parts = name.split(".")
    return (
        parts[0] == "torch"
        and parts[1:2] != ["ops"]
        and any(part.startswith("_") and not part.startswith("__") for part in parts)
    )


def private_torch_stays_in_compat(source: Source) -> list[str]:
    """Imports, attribute chains from any name bound to a torch module, and module names in strings."""
    if source.module.endswith("._compat"):
        return []
    bound = {"torch": "torch"}
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = {(name, line) for name, line, _ in imports(source)}
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Attribute):
            attributes: list[str] = []
            root: ast.expr = node
            while isinstance(root, ast.Attribute):
                attributes.insert(0, root.attr)
                root = root.value
            if isinstance(root, ast.Name):
                used.add((".".join([bound.get(root.id, root.id), *attributes]), node.lineno))
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.fullmatch(r"torch(\.\w+)+", node.value)
        ):
            used.add((node.value, node.lineno))
    used = {
        (name, at) for name, at in used if not any(at == line and other.startswith(name + ".") for other, line in used)
    }
    private = sorted({(line, name) for name, line in used if _is_private_torch(name)})
    return [
        f"{source.path}:{line}: {name} is private torch API; reach it through a _compat.py." for line, name in private
    ]


def a_file_is_small(source: Source) -> list[str]:
    lines, most = source.text.count("\n") + 1, MAX_TEST_LINES if within(source.module, "tests") else MAX_LINES
    return [f"{source.path}: {lines} lines; over {most} it holds two ideas."] if lines > most else []


def a_file_is_named_for_its_idea(source: Source) -> list[str]:
    drawers = [part for part in source.module.split(".") if part.strip("_") in FORBIDDEN_NAMES]
    return [f"{source.path}: {part!r} says nothing of what the room holds." for part in drawers]


IN_THE_PLACE_OF_OTHERS = {f"fusion_compile.optim.{name}" for name in ("kaon", "kaon_without_rate", "kempner")}
"""Modules whose classes have the constructors of another package's, argument by argument."""


def private_functions(source: Source) -> Iterator[tuple[str, int, int]]:
    """``(name, line, parameters)`` of every function that is not public: its own name, its class's or a part of its
    module's begins with an underscore, or it is an `__init__`, which users of this package never call, but for those of
    `IN_THE_PLACE_OF_OTHERS`. `self` and `cls` do not count."""
    called = source.module in IN_THE_PLACE_OF_OTHERS
    in_private = any(part.startswith("_") for part in source.module.split("."))
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (in_private or node.name.startswith("_")):
            if called and node.name == "__init__":
                continue
            a = node.args
            names = [arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if arg is not None]
            yield node.name, node.lineno, len(names) - (names[:1] in (["self"], ["cls"]))


def a_private_function_has_few_parameters(source: Source) -> list[str]:
    return [
        f"{source.path}:{line}: {name} has {count} parameters; more than {MAX_PARAMETERS} are a record without a name."
        for name, line, count in private_functions(source)
        if count > MAX_PARAMETERS
    ]


RULES: list[Rule] = [
    a_room_imports_what_it_may,
    strangers_never_meet,
    passes_know_torch_and_themselves,
    private_torch_stays_in_compat,
    a_file_is_small,
    a_file_is_named_for_its_idea,
    a_private_function_has_few_parameters,
]


def arrows(package: list[Source]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    modules = {source.module for source in package}
    graph: dict[str, set[str]] = {}
    for source in package:
        targets = {module_of(name, modules) for name, _, _ in imports(source)}
        graph[source.module] = {t for t in targets if t in modules and t != source.module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The groups of two or more modules that import each other, directly or around corners (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found
