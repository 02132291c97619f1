"""A second process with empty caches compiles nothing of what a first one saved, and computes the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

STEP = """
import sys, torch, fusion_compile as fc
from torch._dynamo.utils import counters
from tests.small_models import mlp, squared_error
folder, program = sys.argv[1], sys.argv[1] if sys.argv[2] == "load" else None
losses = []
for capture in ("read", "run"):
    step = fc.compile_training_step(mlp(), squared_error, optimizer="adamw", capture=capture, program=program)
    losses += [step(torch.ones(8, 4), torch.zeros(8, 2)) for _ in range(2)]
if sys.argv[2] == "save":
    step.save_program(folder)
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(hits if hits == 2 else 0, *(loss.numpy().tobytes().hex() for loss in losses))
"""
SAMPLER = """
import sys, torch, fusion_compile as fc
from torch._dynamo.utils import counters
from tests.program.saved.test_folder_in_two_processes import Model
folder, program = sys.argv[1], sys.argv[1] if sys.argv[2] == "load" else None
torch.manual_seed(0)
sampler = fc.optimize_sampler(Model().eval(), 2, mode="default", program=program)
out = sampler(torch.ones(2, 8), torch.full((2,), 0.5))
if sys.argv[2] == "save":
    sampler.save_program(folder)
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
misses = counters["inductor"]["fxgraph_cache_miss"]
print(hits if not misses else 0, out.detach().numpy().tobytes().hex())
"""


class Model(nn.Module):
    """A denoiser of two layers, modulated by its time."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.up, self.down = nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.time(t[:, None]))


def run(program: str, folder: Path, what: str, cache: Path) -> list[str]:
    given = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:fusion_compile", "-c", program, str(folder), what],
        env=given,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.exhaustive
@pytest.mark.parametrize("program", [STEP, SAMPLER], ids=["step", "sampler"])
def test_a_second_process_compiles_nothing(program: str, tmp_path: Path) -> None:
    _, *first = run(program, tmp_path / "program", "save", tmp_path / "one")
    hits, *second = run(program, tmp_path / "program", "load", tmp_path / "other")
    assert int(hits) > 0
    assert second == first
    # The kernels came with the program: what torch writes beside them to compile one, an object file or a header, it
    # did not need.
    assert not list((tmp_path / "other").rglob("*.o"))


def test_a_sampler_is_saved_only_when_it_has_a_program(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no program to save before its first call"):
        fc.optimize_sampler(Model().eval(), 2, mode="default").save_program(tmp_path)
    with pytest.raises(ValueError, match="mode='eager' uses none"):
        fc.optimize_sampler(Model().eval(), 2, mode="eager").save_program(tmp_path)
    with pytest.raises(ValueError, match="mode='eager' uses none"):
        fc.optimize_sampler(Model().eval(), 2, mode="eager", program=tmp_path)
    with pytest.warns(UserWarning, match="holds no saved program"):
        fc.optimize_sampler(Model().eval(), 2, mode="default", program=tmp_path)
