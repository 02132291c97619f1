"""The command that shows a GPU's kernels: what it keeps instead of compiling it, what it prints, what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fusion_compile as fc
from fusion_compile._gpu_program import command
from fusion_compile._gpu_program.generated import Generated, Launch, Partition
from fusion_compile.cli import main

FACTORY = """
import torch
import fusion_compile as fc
from torch import nn

def step():
    step = fc.compile_training_step(nn.Linear(64, 64), lambda m, x: m(x).square().mean(), optimizer="adamw")
    return step, (torch.ones(4, 64),)

def nothing():
    return nn.Linear(4, 4)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "factories_for_a_gpu.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "factories_for_a_gpu", raising=False)
    return tmp_path


def squared(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def test_a_step_is_kept_and_runs_as_it_was_captured() -> None:
    with command.kept_instead_of_compiled() as kept:
        model = nn.Linear(4, 2)
        before = model.weight.detach().clone()
        step = fc.compile_training_step(model, squared, optimizer="adamw")  # by Inductor, which is not called
        command.capture(step, (torch.ones(3, 4),), {}, kept)
        assert len(kept) == 1 and kept[0].gradients
        command.capture(step, (torch.ones(3, 4),), {}, kept)
    assert len(kept) == 1, "what was captured is not captured again"
    assert not torch.equal(model.weight, before)


def test_a_callable_of_no_kind_of_ours_is_kept_too() -> None:
    with command.kept_instead_of_compiled() as kept, torch.no_grad():
        command.capture(nn.Linear(4, 2), (torch.ones(3, 4),), {}, kept)
    assert [one.gradients for one in kept] == [False]
    with command.kept_instead_of_compiled() as kept:
        command.capture(nn.Linear(4, 2), (), {}, kept)
    assert kept == []


def test_launches_and_bytes_are_said_by_region_and_what_stands_against_one_graph() -> None:
    launches = [
        Launch("forward", "extern", "extern_kernels.mm", 3_000_000),
        Launch("forward", "triton", "op1", 500_000),
        Launch("optimizer", "triton", "op2", 9_000_000),
    ]
    graph = Partition(("weight", "x"), frozenset({"weight"}), frozenset({"weight"}))
    found = Generated(["def call(args): pass"], [graph], launches=launches, devices={"cuda"})
    assert command.said(0, found).splitlines() == [
        "program 0: 3 launches, 12.500 MB",
        "  forward       1 of libraries + 1    of Triton,     3.500 MB",
        "  optimizer     0 of libraries + 1    of Triton,     9.000 MB",
        "      9.000 MB  optimizer  op2",
        "      3.000 MB  forward    extern_kernels.mm",
        "      0.500 MB  forward    op1",
    ]
    found.skips.append("cpu device (x)")
    assert "  not one CUDA graph: no CUDA graph would be recorded: cpu device (x)." in command.said(0, found)


@pytest.mark.skipif(importlib.util.find_spec("triton") is not None, reason="Triton is installed")
def test_without_triton_the_command_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories_for_a_gpu:step", "--target", "h100"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "--target h100: Triton is not installed" in said.err and "pip install" in said.err
    assert command.main(["factories_for_a_gpu:step", "h100"]) == 2


def test_an_unknown_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "factories_for_a_gpu:step", "--target", "h1000"]) == 2
    assert "--target h1000 is no GPU that programs are written for; use h100." in capsys.readouterr().err


@pytest.mark.cuda_codegen
@pytest.mark.timeout(600)
def test_the_kernels_of_a_gpu_are_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    triton = importlib.util.find_spec("triton")
    assert triton is not None and triton.origin is not None
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(triton.origin).parents[1]}")
    assert main(["explain", "factories_for_a_gpu:step", "--steps", "0", "--target", "h100"]) == 0
    said = capsys.readouterr().out
    assert "what Inductor writes for an NVIDIA H100, seen without one:" in said
    assert "program 0: " in said and " of libraries + " in said and "not one CUDA graph" not in said
    assert command.main(["factories_for_a_gpu:nothing", "h100"]) == 2
    assert "compiled nothing that could be written for a GPU" in capsys.readouterr().err
