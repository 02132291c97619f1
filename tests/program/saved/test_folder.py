"""A saved program is written whole or not at all, and taken only where it fits."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fusion_compile._program.saved import _compat, folder
from fusion_compile._program.saved.folder import FILE, load_program, save_program
from fusion_compile._program.saved.kind import machine_kind

CPU = torch.device("cpu")


class Torch:
    """What torch's caches hold, in the place of a compiler's minutes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.artifacts: bytes | None = b"compiled"
        self.taken: list[bytes] = []
        self.root = root
        monkeypatch.setattr(_compat, "artifacts", lambda: self.artifacts)
        monkeypatch.setattr(_compat, "cache_folder", lambda: self.root)
        monkeypatch.setattr(_compat, "loaded_kernels", lambda: sorted(self.root.rglob("*.so")))
        monkeypatch.setattr(_compat, "know_vector_instructions", lambda found: True)
        monkeypatch.setattr(_compat, "take", lambda given: not self.taken.append(given))  # type: ignore[func-returns-value]

    def with_kernel(self) -> Path:
        kernel = self.root / "ab" / "cab.so"
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(b"machine code")
        return kernel


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Torch:
    return Torch(monkeypatch, tmp_path / "cache")


def silent(load: Callable[[], bool]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load()


def test_another_machine_of_the_kind_gets_artifacts_and_kernels(caches: Torch, tmp_path: Path) -> None:
    kernel = caches.with_kernel()
    save_program(tmp_path / "program", CPU, [Torch], "the step")
    assert [file.name for file in (tmp_path / "program").iterdir()] == [FILE]
    caches.root = tmp_path / "elsewhere"
    assert silent(lambda: load_program(tmp_path / "program", CPU, [Torch]))
    assert caches.taken == [b"compiled"]
    assert (caches.root / "ab" / "cab.so").read_bytes() == kernel.read_bytes()


def test_a_kernel_that_is_there_stays(caches: Torch, tmp_path: Path) -> None:
    kernel = caches.with_kernel()
    save_program(tmp_path, CPU, [], "the step")
    kernel.write_bytes(b"loaded by somebody")
    load_program(tmp_path, CPU, [])
    assert kernel.read_bytes() == b"loaded by somebody"


def test_another_kind_is_not_taken_and_the_reason_is_said(
    caches: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_program(tmp_path, CPU, [], "the step")
    kind = machine_kind(CPU)
    monkeypatch.setattr(folder, "machine_kind", lambda device: {**kind, "instructions": "DEFAULT"})
    with pytest.warns(UserWarning, match=r"is not used: it was compiled for a CPU .*, and this is a CPU .* DEF"):
        assert not load_program(tmp_path, CPU, [])
    assert caches.taken == []


def test_changed_source_is_named_and_the_rest_taken(
    caches: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_program(tmp_path, CPU, [], "the step")
    monkeypatch.setattr(folder, "sources", lambda objects: {"model": "another"})
    with pytest.warns(UserWarning, match=r"^model changed since the program in .* was saved"):
        assert load_program(tmp_path, CPU, [])


def test_without_a_program_a_warning_says_how_to_save_one(caches: Torch, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds no saved program, .*save_program\('.*none'\) writes one"):
        assert not load_program(str(tmp_path / "none"), CPU, [])


@pytest.mark.parametrize("harm", ["cut", "bit", "path", "format"])
def test_a_damaged_program_is_refused(caches: Torch, tmp_path: Path, harm: str) -> None:
    save_program(tmp_path, CPU, [], "the step")
    file = tmp_path / FILE
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    index = json.loads(parts["index.json"])
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        if harm == "bit":
            parts["artifacts.bin"] = b"compiles"
        if harm == "path":
            parts["kernels/../../escaped.so"] = b""
            index["checksums"]["kernels/../../escaped.so"] = folder._sum(b"")
        if harm == "format":
            index["format"] = 2
        parts["index.json"] = json.dumps(index).encode()
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
    with pytest.raises(ValueError, match="is damaged"):
        load_program(tmp_path, CPU, [])
    assert caches.taken == [] and not (tmp_path / "escaped.so").exists()


def test_without_caches_nothing_can_be_saved(caches: Torch, tmp_path: Path) -> None:
    caches.artifacts = None
    with pytest.raises(ValueError, match="the step cannot be saved: torch has kept nothing"):
        save_program(tmp_path / "program", CPU, [], "the step")
    assert not (tmp_path / "program").exists()


def test_a_save_that_fails_leaves_the_older_program(
    caches: Torch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_program(tmp_path, CPU, [], "the step")
    before = (tmp_path / FILE).read_bytes()

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"the step was not saved in .*, because the disk is full"):
        save_program(tmp_path, CPU, [], "the step")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_a_file_is_no_folder(caches: Torch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="a saved program is a folder"):
        save_program(tmp_path / "file", CPU, [], "the step")
