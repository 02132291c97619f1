"""The house rules hold, each is shown a planted violation, and what is installed is the tree.

The rules are in ``tests/house/rules.py``, the architecture in ``tests/house/rooms.py``.
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
from itertools import chain
from pathlib import Path

import pytest

from tests.house.mirror import strays, untested
from tests.house.rules import (
    MAX_LINES,
    MAX_TEST_LINES,
    RULES,
    Rule,
    a_file_is_named_for_its_idea,
    a_file_is_small,
    a_private_function_has_few_parameters,
    a_room_imports_what_it_may,
    arrows,
    circles,
    nobody_imports_bare_passes,
    passes_know_torch_and_themselves,
    private_torch_stays_in_compat,
    strangers_never_meet,
)
from tests.house.slow import stale
from tests.house.source import EVERYTHING, PACKAGE, ROOT, TESTS, Source

PUBLIC_PACKAGES = ["fusion_compile", "fusion_compile.optim", "fusion_compile.passes", "fusion_compile.explain"]


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
        (a_room_imports_what_it_may, "fusion_compile._types", "from fusion_compile._state import banks"),
        (a_room_imports_what_it_may, "fusion_compile._state.banks", "from .. import compile_training_step"),
        (a_room_imports_what_it_may, "fusion_compile.optim.clip", "from fusion_compile._step.loss import LossModule"),
        (
            a_room_imports_what_it_may,
            "fusion_compile._sampler.module",
            "def f():\n    import fusion_compile.explain as explain",
        ),
        (a_room_imports_what_it_may, "fusion_compile.a_new_room", ""),
        (a_room_imports_what_it_may, "fusion_compile.optim.clip", "from fusion_compile.passes import Pass"),
        (a_room_imports_what_it_may, "fusion_compile.passes.dedupe", "from ..optim.clip import x"),
        (strangers_never_meet, "fusion_compile._program.lower", "from fusion_compile._program import cuda_graph"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "from .. import _types"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "from fusion_compile.passes import _pass"),
        (passes_know_torch_and_themselves, "fusion_compile.passes.dedupe", "import numpy as np"),
        (nobody_imports_bare_passes, "fusion_compile.sampler", "import passes.dedupe"),
        (nobody_imports_bare_passes, "examples.sample", "from passes import dedupe"),
        (private_torch_stays_in_compat, "fusion_compile._step.pure_step", "import torch._dynamo"),
        (private_torch_stays_in_compat, "fusion_compile._step.pure_step", "from torch import _foreach_add"),
        (private_torch_stays_in_compat, "fusion_compile._step.pure_step", "from torch.utils import _pytree as pytree"),
        (
            private_torch_stays_in_compat,
            "fusion_compile._step.pure_step",
            "import torch\ntorch._inductor.config.fx_graph_cache = True",
        ),
        (
            private_torch_stays_in_compat,
            "fusion_compile._step.pure_step",
            "from torch import nn as n\nn.functional._pad(x)",
        ),
        (private_torch_stays_in_compat, "fusion_compile._step.pure_step", "import_module('torch._dynamo')"),
        (a_file_is_small, "fusion_compile._step.pure_step", "x = 1\n" * MAX_LINES),
        (a_file_is_small, "tests.state.test_banks", "x = 1\n" * MAX_TEST_LINES),
        (
            a_private_function_has_few_parameters,
            "fusion_compile._step.loss",
            "def f(a, b, c, d, e, *, g, h, i, j): ...",
        ),
        (a_private_function_has_few_parameters, "fusion_compile.sampler", "def _f(a, b, c, d, e, *f, g, h, **i): ..."),
        (a_file_is_named_for_its_idea, "fusion_compile._utils", ""),
        (a_file_is_named_for_its_idea, "fusion_compile.core.graph", ""),
    ],
)
def test_a_planted_violation_is_found(rule: Rule, module: str, text: str) -> None:
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


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(arrows(PACKAGE)) == []


def test_a_planted_circle_is_found() -> None:
    def planted(name: str, text: str) -> Source:
        return Source(f"fusion_compile.{name}", False, "planted.py", text)

    two = [planted("a", "from fusion_compile.b import x"), planted("b", "def f():\n    import fusion_compile.a")]
    round_the_corner = [planted("c", "from fusion_compile.a import x"), planted("d", "from fusion_compile.c import x")]
    assert circles(arrows([*two, *round_the_corner])) == [["fusion_compile.a", "fusion_compile.b"]]


def test_test_files_are_small() -> None:
    assert [sentence for source in TESTS for sentence in a_file_is_small(source)] == []


def test_a_test_file_is_found_from_the_name_of_its_module() -> None:
    said = strays(TESTS, PACKAGE) + untested(TESTS, PACKAGE)
    assert not said, "\n" + "\n".join(said)


def test_a_stray_test_file_and_an_untested_module_are_found() -> None:
    banks = Source("fusion_compile._state.banks", False, "fusion_compile/_state/banks.py", "def f(): ...")
    stray = Source("tests.state.test_bank", False, "tests/state/test_bank.py", "")
    assert len(strays([stray], [banks])) == len(untested([stray], [banks])) == 1
    named = Source("tests.state.test_banks_odd", False, "tests/state/test_banks_odd.py", "")
    assert strays([named], [banks]) + untested([named], [banks]) == []


def test_every_slow_test_exists() -> None:
    comment, *lines = (ROOT / "tests" / "slow_tests.txt").read_text(encoding="utf-8").splitlines()
    assert comment.startswith("#") and len(lines) == len({*lines})
    assert stale(lines, TESTS) == []


def test_a_slow_test_that_was_renamed_is_found() -> None:
    source = Source("tests.test_x", False, "tests/test_x.py", "class A:\n    def test_y(self): ...")
    good = ["tests/test_x.py::A::test_y[a::b]", "tests/test_x.py::test_y"]
    assert stale([*good, "tests/test_x.py::test_z[a]", "tests/test_w.py::test_y"], [source]) == [
        "tests/slow_tests.txt: there is no test tests/test_x.py::test_z[a]; take the line out, or write its new name.",
        "tests/slow_tests.txt: there is no test tests/test_w.py::test_y; take the line out, or write its new name.",
    ]


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
    tree |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fusion_compile/explain/_show/templates").iterdir()}
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
