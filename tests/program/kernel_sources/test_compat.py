"""Inductor compiles the kernels of a CPU's program in a few files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import async_compile, codecache
from torch._inductor.utils import fresh_cache

from fusion_compile._program.kernel_sources import joined
from fusion_compile._program.kernel_sources._compat import kernels_compiled_together


def three_kernels(x: Tensor, w: Tensor) -> Tensor:
    """Products between them keep the three apart."""
    return torch.softmax((x.sin() @ w).cos() @ w, 1)


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    torch.compiler.reset()
    return torch.randn(8, 8), torch.randn(8, 8)


def files_of(cache: str) -> list[Path]:
    return list(Path(cache).rglob("*.main.cpp"))


def compiled(folder: Path, inputs: tuple[Tensor, Tensor], together: bool, monkeypatch: Any) -> Tensor:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch.compiler.reset()
    codecache.CppPythonBindingsCodeCache.cache_clear()
    if not together:
        return torch.compile(three_kernels)(*inputs)
    with kernels_compiled_together():
        return torch.compile(three_kernels)(*inputs)


def test_the_kernels_are_in_one_file_and_compute_the_same_bits(
    inputs: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    apart = compiled(tmp_path / "apart", inputs, False, monkeypatch)
    together = compiled(tmp_path / "together", inputs, True, monkeypatch)
    assert torch.equal(apart, together)
    number = len(files_of(str(tmp_path / "apart"))) - len(files_of(str(tmp_path / "together")))
    assert number >= 2, "three kernels would be three files"
    again = compiled(tmp_path / "together", inputs, True, monkeypatch)
    assert torch.equal(again, together), "what the cache gives back finds its kernels"


def test_torch_compiles_them_one_by_one_afterwards() -> None:
    theirs = vars(async_compile.AsyncCompile)["cpp_pybinding"], vars(async_compile.AsyncCompile)["wait"]
    with kernels_compiled_together():
        assert vars(async_compile.AsyncCompile)["cpp_pybinding"] is not theirs[0]
    assert (vars(async_compile.AsyncCompile)["cpp_pybinding"], vars(async_compile.AsyncCompile)["wait"]) == theirs


def test_a_file_that_does_not_compile_is_compiled_kernel_by_kernel_and_said(
    inputs: tuple[Tensor, Tensor], monkeypatch: Any
) -> None:
    monkeypatch.setattr(joined.File, "source", lambda self: "#error planted\n")
    with fresh_cache(), kernels_compiled_together(), pytest.warns(UserWarning, match="one by one, which takes longer"):
        got = torch.compile(three_kernels)(*inputs)
    # Eager softmax and products round otherwise.
    torch.testing.assert_close(got, three_kernels(*inputs), rtol=1e-5, atol=1e-6)


def test_where_torch_has_moved_it_nothing_happens(inputs: tuple[Tensor, Tensor], monkeypatch: Any) -> None:
    monkeypatch.setattr(codecache.CppPythonBindingsCodeCache, "suffix_template", "// another text")
    theirs = vars(async_compile.AsyncCompile)["cpp_pybinding"]
    with kernels_compiled_together():
        assert vars(async_compile.AsyncCompile)["cpp_pybinding"] is theirs
