"""The room of other people's trainers: imported on demand, in the reference, and a sentence without the library."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys

import pytest

from tests.house.source import PACKAGE, ROOT, tree

MODULES = [s for s in PACKAGE if s.module.startswith("fusion_compile.integrations.") and "._" not in s.module]


def public(source: object) -> set[str]:
    nodes = tree(source).body
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")}


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "integrations.md").read_text(encoding="utf-8")
    wanted = {f"{source.module}.{name}" for source in MODULES for name in public(source)}
    assert wanted == set(re.findall(r"^::: (\S+)$", text, re.MULTILINE)) and len(wanted) >= 3


def test_the_package_imports_none_of_the_libraries() -> None:
    libraries = ["lightning", "pytorch_lightning", "transformers", "accelerate", "ignite"]
    code = (
        f"import sys, fusion_compile, fusion_compile.integrations; print([n for n in {libraries} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_without_the_library_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lightning" else found(name, *a))
    monkeypatch.delitem(sys.modules, "pytorch_lightning", raising=False)
    monkeypatch.delitem(sys.modules, "fusion_compile.integrations.lightning", raising=False)
    with pytest.raises(ModuleNotFoundError, match="needs Lightning: pip install lightning"):
        importlib.import_module("fusion_compile.integrations.lightning")
