"""The README's example and the command run from an installed wheel, outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from tests.test_snippets import BLOCKS

ROOT = Path(__file__).parents[1]
IN_THE_SOURCE_ARCHIVE = ("pyproject.toml", "README.md", "LICENSE", "fusion_compile", "passes")
UNCOMPILED = """
import functools, sys
import fusion_compile as fc
assert fc.__file__.startswith(sys.prefix), fc.__file__
for name in ("compile_training_step", "optimize_sampler"):
    setattr(fc, name, functools.partial(getattr(fc, name), mode="eager"))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """What `command` printed; it sees neither the checkout nor what the tests' environment adds to Python's path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the source archive and the wheel that was built from it, as `make wheel` builds both."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    copy.mkdir()
    for name in IN_THE_SOURCE_ARCHIVE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", cwd=copy)
    return folder / "dist"


@pytest.fixture(scope="module")
def python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the wheel installed, and with torch and the other dependencies of this environment on its path.

    A line of a ``.pth`` file is a folder to import from; ``.pth`` files *in* that folder, such as that of an editable
    install, are not read.
    """
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    packages = Path(
        run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = built.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    return interpreter


def test_the_source_archive_has_no_link_and_all_passes(built: Path) -> None:
    """Windows and zip archives lose links; the wheel is built from this archive."""
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        members = files.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    passes = {path.name for path in (ROOT / "passes").glob("*.py")}
    names = [member.name.split("/", 1)[-1] for member in members]
    assert passes <= {name.rpartition("/")[2] for name in names if "passes/" in name}


def test_the_readmes_example_runs(python: Path, tmp_path: Path) -> None:
    (example,) = BLOCKS["README.md"]
    code = UNCOMPILED + example.code.replace("range(50)", "range(3)") + "\nprint(samples.shape, loss.ndim)\n"
    (tmp_path / "example.py").write_text(code)
    assert run(python, "example.py", cwd=tmp_path) == "torch.Size([10, 64]) 0\n"


def test_every_public_package_is_imported_and_typed(python: Path, tmp_path: Path) -> None:
    code = (
        "import fusion_compile as fc, fusion_compile.passes, importlib.metadata, pathlib, sys\n"
        "root = pathlib.Path(fc.__file__).parent\n"
        "assert root.is_relative_to(sys.prefix) and (root / 'py.typed').exists()\n"
        "assert not (root / 'passes').is_symlink()\n"
        "assert importlib.metadata.version('fusion-compile') == fc.__version__\n"
    )
    run(python, "-c", code, cwd=tmp_path)


def test_the_command_is_there(python: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import torch\n"
        "import fusion_compile as fc\n"
        "def make_step():\n"
        "    loss = lambda model, x: model(x).square().mean()\n"
        "    return fc.compile_training_step(torch.nn.Linear(4, 2), loss, optimizer='adamw', mode='eager')\n"
    )
    command = python.parent / "fusion-compile"
    assert "explain" in run(command, "--help", cwd=tmp_path)
    assert "TrainingStep" in run(command, "explain", "train:make_step", "--html", "report.html", cwd=tmp_path)
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
