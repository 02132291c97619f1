"""Kernels are found where torch has loaded them from, and vector instructions are taken over only if they agree."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import cpu_vec_isa
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._program.lower import lower_graph
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


def test_a_graph_that_dynamo_did_not_capture_is_found_again() -> None:
    def product(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return (x @ w,)

    x, w = torch.ones(2, 3), torch.ones(3, 4)
    with fresh_cache():
        counters.clear()
        for hits in (0, 1):
            graph = make_fx(product, tracing_mode="fake")(x, w)
            run = lower_graph(graph, [x, w], mode="default")
            assert torch.equal(run(x, w)[0], x @ w)
            found = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
            assert found == hits
    counters.clear()
