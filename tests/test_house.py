"""The house rules: imports go downstairs, a room is small and named for its idea, and what is installed is the tree.

Each rule over the sources is a function from a module to sentences, run on every file and on a planted violation.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Module -> floor. `a.b.*` stands for everything below `a.b`; the longest entry that fits counts, an exact name first.
# A new module goes on the lowest floor from which all that it imports lies beside or below it.
FLOORS = {
    # 0: torch and nothing of ours
    "fusion_compile.passes": 0,
    "fusion_compile.passes.*": 0,
    "fusion_compile.optim.matrix": 0,
    "fusion_compile.optim.matrix.*": 0,
    "fusion_compile._compat": 0,
    # 1: the nouns
    "fusion_compile._types": 1,
    "fusion_compile._flat": 1,
    "fusion_compile._batch": 1,
    "fusion_compile._host_reads": 1,
    "fusion_compile._say_once": 1,
    "fusion_compile._progress": 1,
    "fusion_compile._diffusers_arguments": 1,
    "fusion_compile._stand_in": 1,
    "fusion_compile._read_back": 1,
    "fusion_compile._untraced": 1,
    "fusion_compile.optim._transform": 1,
    "fusion_compile.optim._combine": 1,
    "fusion_compile.optim._schedules": 1,
    "fusion_compile.optim._named": 1,
    # 2: a module as flat state, a program, one paper a file
    "fusion_compile._state": 2,
    "fusion_compile._program": 2,
    "fusion_compile._routing": 2,
    "fusion_compile._parameter_group": 2,
    "fusion_compile._named_groups": 2,
    "fusion_compile._hyperparameters": 2,
    "fusion_compile._loss": 2,
    "fusion_compile._checkpoint": 2,
    "fusion_compile._warm_start": 2,
    "fusion_compile._roles": 2,
    "fusion_compile._unservable_models": 2,
    "fusion_compile._denoiser_call": 2,
    "fusion_compile._denoiser_graph": 2,
    "fusion_compile._export_refusal": 2,
    "fusion_compile._symbolic_graph": 2,
    "fusion_compile._graphs_by_shape": 2,
    "fusion_compile._step_index": 2,
    "fusion_compile._pass_watch": 2,
    "fusion_compile._request_slot": 2,
    "fusion_compile._hoisted_weights": 2,
    "fusion_compile._structure_watch": 2,
    "fusion_compile._weight_watch": 2,
    "fusion_compile._sampler_report": 2,
    "fusion_compile._diffusers_calls": 2,
    "fusion_compile._timestep_range": 2,
    "fusion_compile.optim.*": 2,
    # 3: a function over flat state becomes a program; recipes
    "fusion_compile._trace": 3,
    "fusion_compile._sampler_facts": 3,
    "fusion_compile._rank_conditioning": 3,
    "fusion_compile._rectified_flow": 3,
    "fusion_compile.optim.fusion": 3,
    "fusion_compile.optim.recipes": 3,
    # 4: a program becomes fast, and becomes a replay
    "fusion_compile._lower": 4,
    "fusion_compile._pieces": 4,
    "fusion_compile._capture": 4,
    "fusion_compile._loop_body": 4,
    # 5: the parts of a sampler; work between steps; what reads and never changes
    "fusion_compile._periodic": 5,
    "fusion_compile._update_program": 5,
    "fusion_compile._grouped_update": 5,
    "fusion_compile._conditioning_table": 5,
    "fusion_compile._sampler_program": 5,
    "fusion_compile._sampler_programs": 5,
    "fusion_compile._sampler_module": 5,
    "fusion_compile._explain_sampler_command": 5,
    "fusion_compile.explain": 5,
    "fusion_compile.explain.*": 5,
    # 6: the two stories, and what watches them
    "fusion_compile.scalar_logger": 6,
    "fusion_compile.cli": 6,
    "fusion_compile.training_step": 6,
    "fusion_compile.sampler": 6,
    # the parts of an optimizer lie low; the package's own door also shows the whole: a torch optimizer
    "fusion_compile.torch_optimizer": 6,
    "fusion_compile.optim": 6,
    # 7: the front door
    "fusion_compile": 7,
}

# Rooms that never meet, whatever their floors.
STRANGERS = [
    ("fusion_compile.optim", "fusion_compile.passes"),
    ("fusion_compile._lower", "fusion_compile._capture"),
    ("fusion_compile.training_step", "fusion_compile.sampler"),
]

MAX_LINES = 400
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "core", "manager"}
PUBLIC_PACKAGES = ["fusion_compile", "fusion_compile.optim", "fusion_compile.passes", "fusion_compile.explain"]


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


Rule = Callable[[Source], list[str]]


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
EVERYTHING = PACKAGE + [read(path) for path in python_files("tests", "examples", "benchmarks")]
MODULES = {source.module for source in PACKAGE}


def imports(source: Source) -> Iterator[Import]:
    """Every import, also inside functions and under TYPE_CHECKING, as absolute dotted names."""
    for node in ast.walk(ast.parse(source.text)):
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


def module_of(name: str) -> str:
    """`fusion_compile._types.Tensors` -> `fusion_compile._types`: the longest known module it begins with."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def floor(module: str) -> int | None:
    """The module's floor, or None where no entry fits."""
    if module in FLOORS:
        return FLOORS[module]
    fitting = [entry for entry in FLOORS if entry.endswith(".*") and module.startswith(entry[:-1])]
    return FLOORS[max(fitting, key=len)] if fitting else None


def imports_go_downstairs(source: Source) -> list[str]:
    here = floor(source.module)
    if here is None:
        return [f"{source.path}: {source.module} has no floor; add it to FLOORS in tests/test_house.py."]
    said = []
    for name, line, _ in imports(source):
        target = module_of(name)
        there = floor(target) if within(target, "fusion_compile") else None
        if there is not None and there > here:
            said.append(
                f"{source.path}:{line}: {source.module} (floor {here}) imports {target} (floor {there}); "
                "imports go to the same floor or lower."
            )
    return said


def strangers_never_meet(source: Source) -> list[str]:
    pairs = STRANGERS + [(b, a) for a, b in STRANGERS]
    return [
        f"{source.path}:{line}: {a} and {b} never import each other."
        for name, line, _ in imports(source)
        for a, b in pairs
        if within(source.module, a) and within(module_of(name), b)
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


def is_private(name: str) -> bool:
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
    tree = ast.parse(source.text)
    bound = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = {(name, line) for name, line, _ in imports(source)}
    for node in ast.walk(tree):
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
    private = sorted({(line, name) for name, line in used if is_private(name)})
    return [
        f"{source.path}:{line}: {name} is private torch API; reach it through a _compat.py." for line, name in private
    ]


def a_room_is_small(source: Source) -> list[str]:
    lines = source.text.count("\n") + 1
    return [f"{source.path}: {lines} lines; over {MAX_LINES} it holds two ideas."] if lines > MAX_LINES else []


def a_room_is_named_for_its_idea(source: Source) -> list[str]:
    drawers = [part for part in source.module.split(".") if part.strip("_") in FORBIDDEN_NAMES]
    return [f"{source.path}: {part!r} says nothing of what the room holds." for part in drawers]


RULES: list[Rule] = [
    imports_go_downstairs,
    strangers_never_meet,
    passes_know_torch_and_themselves,
    private_torch_stays_in_compat,
    a_room_is_small,
    a_room_is_named_for_its_idea,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    said = [sentence for source in PACKAGE for sentence in rule(source)]
    assert not said, "\n" + "\n".join(said)


def test_nobody_imports_bare_passes() -> None:
    said = [sentence for source in EVERYTHING for sentence in nobody_imports_bare_passes(source)]
    assert not said, "\n" + "\n".join(said)


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (imports_go_downstairs, "fusion_compile._types", "from fusion_compile import _state"),
        (imports_go_downstairs, "fusion_compile._state", "from . import compile_training_step"),
        (imports_go_downstairs, "fusion_compile.optim._combine", "from .scale_by_adam import scale_by_adam"),
        (
            imports_go_downstairs,
            "fusion_compile.optim._combine",
            "def f():\n    import fusion_compile.optim.clip as clip",
        ),
        (imports_go_downstairs, "fusion_compile.a_new_room", ""),
        (strangers_never_meet, "fusion_compile.optim.clip", "from fusion_compile.passes import Pass"),
        (strangers_never_meet, "fusion_compile.passes.dedupe", "from ..optim import x"),
        (strangers_never_meet, "fusion_compile._lower", "from fusion_compile import _capture"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "from .. import _types"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "from fusion_compile.passes import _pass"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "import numpy as np"),
        (nobody_imports_bare_passes, "fusion_compile.sampler", "import passes.dedupe"),
        (nobody_imports_bare_passes, "examples.sample", "from passes import dedupe"),
        (private_torch_stays_in_compat, "fusion_compile._trace", "import torch._dynamo"),
        (private_torch_stays_in_compat, "fusion_compile._trace", "from torch import _foreach_add"),
        (private_torch_stays_in_compat, "fusion_compile._trace", "from torch.utils import _pytree as pytree"),
        (
            private_torch_stays_in_compat,
            "fusion_compile._trace",
            "import torch\ntorch._inductor.config.fx_graph_cache = True",
        ),
        (private_torch_stays_in_compat, "fusion_compile._trace", "from torch import nn as n\nn.functional._pad(x)"),
        (private_torch_stays_in_compat, "fusion_compile._trace", "import_module('torch._dynamo')"),
        (a_room_is_small, "fusion_compile._trace", "x = 1\n" * MAX_LINES),
        (a_room_is_named_for_its_idea, "fusion_compile._utils", ""),
        (a_room_is_named_for_its_idea, "fusion_compile.core.graph", ""),
    ],
)
def test_a_planted_violation_is_found(rule: Rule, module: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {entry for entry in FLOORS if not entry.endswith(".*")} | {"fusion_compile.optim.scale_by_adam"}
    monkeypatch.setitem(globals(), "MODULES", MODULES | every)  # also the rooms that are not built yet
    assert rule(Source(module, False, "planted.py", text))


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (
            "fusion_compile.passes.dedupe",
            "import operator\nimport torch\nfrom ._pass import Pass\nfrom . import _graph",
        ),
        (
            "fusion_compile.sampler",
            "from fusion_compile.passes import dedupe\nfrom fusion_compile._types import Tensors",
        ),
        (
            "fusion_compile.optim.clip",
            "import torch\ntorch.__version__\ntorch.ops.aten._to_copy\nself._torch\n'torch._x is.'",
        ),
        ("fusion_compile._compat", "import torch._dynamo"),
    ],
)
def test_a_planted_good_file_is_left_alone(module: str, text: str) -> None:
    source = Source(module, False, "planted.py", text)
    assert [sentence for rule in [*RULES, nobody_imports_bare_passes] for sentence in rule(source)] == []


def test_passes_is_linked_into_the_package() -> None:
    link = ROOT / "fusion_compile" / "passes"
    assert link.is_symlink(), "fusion_compile/passes is a link, so that tools and bare checkouts see what is installed"
    assert os.readlink(link) == "../passes"


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    """Built from a copy, as setuptools leaves its `build/` where it works and takes stale files from one it finds."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fusion_compile", "passes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        inside = {name for name in wheel.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in wheel.namelist()}
    tree = {source.path for source in PACKAGE} | {"fusion_compile/py.typed"}
    tree |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fusion_compile/explain/templates").iterdir()}
    assert inside == {re.sub("^passes/", "fusion_compile/passes/", path) for path in tree}
    assert "licenses/LICENSE" in about


def test_the_constraints_pin_all_that_make_installs() -> None:
    """Each line is an exact version, and no direct dependency is left to chance."""

    def canonical(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(chain(project["dependencies"], *project["optional-dependencies"].values()))
    names = {canonical(re.split(r"[<>=!~\[; ]", wish)[0]) for wish in wanted}
    assert names <= {canonical(pin.partition("==")[0]) for pin in pins}


def public_names(package: str) -> list[str]:
    """`__all__`, or where a package has none the names it re-exports in the form ``from x import y as y``."""
    module = importlib.import_module(package)
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    assert module.__file__ is not None
    nodes = ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
    aliases = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return sorted(alias.asname for alias in aliases if alias.asname == alias.name)


def test_the_front_door_names_something_and_the_version_of_the_project() -> None:
    assert public_names("fusion_compile")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert importlib.import_module("fusion_compile").__version__ == project["version"]


@pytest.mark.parametrize("package", PUBLIC_PACKAGES)
def test_public_names_exist_and_are_documented(package: str) -> None:
    module = importlib.import_module(package)
    names = public_names(package)
    assert [name for name in names if not hasattr(module, name)] == []
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.exists())
    words = set(re.findall(r"\w+", text))
    missing = [name for name in names if name not in words]
    assert not missing, f"{package}: no page of docs/ nor the README mentions {', '.join(missing)}."
