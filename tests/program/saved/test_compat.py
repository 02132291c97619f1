"""Kernels are found where torch has loaded them from, and vector instructions are taken over only if they agree."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
from torch._inductor import cpu_vec_isa

from fusion_compile._program.saved import _compat


def test_only_libraries_in_the_cache_folder_are_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_compat, "cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    for name, file in {"one": "cache/one.so", "two": "two.so", "three": "cache/three.py"}.items():
        (tmp_path / file).write_text("")
        module = types.ModuleType(name)
        module.__file__ = str(tmp_path / file)
        monkeypatch.setitem(sys.modules, f"kernel_{name}", module)
    assert _compat.loaded_kernels() == [tmp_path / "cache" / "one.so"]


def test_instructions_that_this_cpu_does_not_have_are_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    known = cpu_vec_isa.valid_vec_isa_list
    before = known.cache_info().currsize
    known.cache_clear()
    try:
        assert not _compat.know_vector_instructions(["made_up"])
        assert _compat.vector_instructions() == []  # torch will look itself
        assert not _compat.know_vector_instructions([])
    finally:
        known.cache_clear()
        if before:
            known()
