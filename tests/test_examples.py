"""The examples run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import diversity
import pytest
import torch
from rich.console import Console

from fusion_compile._state import checkpoint_folder

ROOT = Path(__file__).parents[1]


def test_the_demo_runs_and_leaves_its_files(tmp_path: Path) -> None:
    """A few uncompiled steps: everything the demo does, except that it learns."""
    command = [
        sys.executable,
        "examples/train_and_sample_digits.py",
        "--quick",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("NOT JUDGED: ") and last.endswith(" s in all."), done.stdout

    for picture in ("samples.png", "loss.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    report = (tmp_path / "report.txt").read_text(encoding="utf-8")
    for said in ("bytes released", "sf_normuon", "Routing", "sampler of DiT", last):
        assert said in report
    names = checkpoint_folder.load(tmp_path / "checkpoint", torch.device("cpu"))["model"]
    assert "blocks.0.attn.qkv.weight" in names


@pytest.mark.exhaustive
def test_the_diversity_example_runs_every_arm() -> None:
    """A few uncompiled steps: warm arms begin where the reference ended, fresh ones far from it."""
    size = diversity.Size(depth=1, batch=8, first=3, steps=2, per_digit=1)
    outcomes = diversity.run(size, 1.05, Console(quiet=True), mode="eager")
    assert list(outcomes) == ["the reference", *diversity.ARMS]
    assert outcomes["the reference"].distance == 0
    for name, (_, warm) in diversity.ARMS.items():
        outcome = outcomes[name]
        assert outcome.ended is None and outcome.skipped == 0 and outcome.task > 0
        assert (outcome.distance < 0.05) == warm, (name, outcome)


@pytest.mark.exhaustive
def test_the_example_on_two_processes_learns_and_saves(tmp_path: Path) -> None:
    """Compiled by Inductor, on gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29561"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [*launch, "examples/train_distributed.py", "--out", str(tmp_path / "checkpoint")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()[-1]
    assert said.startswith("2 ranks, step 400: test accuracy ") and float(said.rpartition(" ")[2]) > 0.9
    assert "4.weight" in checkpoint_folder.load(tmp_path / "checkpoint", torch.device("cpu"))["model"]
