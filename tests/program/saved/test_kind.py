"""What a saved program fits is said in words, and a changed source is named."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusion_compile._program.saved.kind import machine_kind, other_kind, other_source, sources


def test_a_kind_is_its_own() -> None:
    kind = machine_kind(torch.device("cpu"))
    assert kind["torch"] == torch.__version__ and kind["device"] == "cpu"
    assert other_kind(kind, kind) == ""


def test_what_differs_is_named_and_nothing_else() -> None:
    kind = machine_kind(torch.device("cpu"))
    said = other_kind({**kind, "torch": "2.11.0", "threads": "64"}, kind)
    assert said == (
        "it was compiled for torch 2.11.0, 64 threads, "
        f"and this is torch {torch.__version__}, {kind['threads']} threads"
    )


def test_a_cpu_of_other_instructions_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """C++ is compiled for all that the CPU has, not for the few sets of instructions that torch tells apart."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "amx_tile": False, "cores": 2})
    here = machine_kind(torch.device("cpu"))
    assert here["cpu"] == "avx2"
    there = {**here, "cpu": "avx2 avx512_bf16 avx512_f"}
    assert other_kind(there, here) == (
        "it was compiled for a CPU with avx512_bf16 avx512_f, and this is a CPU with nothing more"
    )


def test_a_changed_module_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a_users_model.py"
    file.write_text("import torch\nclass Model(torch.nn.Module): ...\ndef loss(model): ...\n")
    spec = importlib.util.spec_from_file_location("a_users_model", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "a_users_model", module)
    spec.loader.exec_module(module)
    before = sources([module.Model(), module.loss])
    assert list(before) == ["a_users_model"]
    assert other_source(before, before) == []
    file.write_text(file.read_text() + "\n")
    assert other_source(before, sources([module.Model(), module.loss])) == ["a_users_model"]


def test_torchs_own_and_what_has_no_file_is_left_out() -> None:
    typed: dict[str, object] = {}
    exec("def loss(model): ...", typed)
    assert sources([nn.Linear(2, 2), functools.partial(print), len, typed["loss"]]) == {}
