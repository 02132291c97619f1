"""What the README promises. Its example runs in ``test_snippets.py``, and installed in ``test_installed.py``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import fusion_compile as fc
from tests.test_snippets import BLOCKS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_recipe_is_in_the_readmes_table() -> None:
    assert all(f'| `"{name}"`' in TEXT for name in fc.optim.RECIPES)


def test_the_readme_is_short() -> None:
    assert len(TEXT.splitlines()) <= 150


def test_the_example_needs_nothing_of_the_checkout() -> None:
    (example,) = BLOCKS["README.md"]
    imports = [line for line in example.code.splitlines() if line.startswith(("import", "from"))]
    assert {line.split()[1].partition(".")[0] for line in imports} == {"torch", "fusion_compile"}


def test_the_example_is_typed(tmp_path: Path) -> None:
    """As strictly as the package is, by both type checkers."""
    (example,) = BLOCKS["README.md"]
    file = tmp_path / "example.py"
    file.write_text(example.code)
    mypy = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(ROOT / ".mypy_cache"), str(file)]
    settings = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "failOnWarnings": True}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    pyright = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--project", str(tmp_path)]
    for command in (mypy, pyright):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
