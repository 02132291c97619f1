"""Models that a step refuses at the door."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fusion_compile as fc
from fusion_compile import _compat
from fusion_compile._step.models import refuse_model
from tests.small_models import compiled, mlp, squared_error


def test_an_ordinary_model_is_taken() -> None:
    refuse_model(nn.DataParallel(mlp()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"the model's 1 is a scripted module \(torch.jit\)"):
        compiled(model)


@pytest.mark.parametrize("mode", ["eager", "default"])
def test_a_wrapper_that_averages_gradients_is_refused_in_every_mode(tmp_path: Path, mode: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(mlp())
        with pytest.raises(ValueError, match=r"the model is wrapped in DistributedDataParallel"):
            fc.compile_training_step(model, squared_error, mode=mode)
        refuse_model(model.module)  # a group of one process averages nothing
    finally:
        dist.destroy_process_group()


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "ranks", lambda: 2)
    with pytest.raises(
        ValueError, match=r"torch.distributed runs with 2 ranks, and without mesh= a step does not average"
    ):
        compiled(mlp())
