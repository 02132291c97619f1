"""Tests: a checkpoint that ranks write together is loaded by any number of ranks and by one process, bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from fusion_compile._state import checkpoint_folder
from tests.ranks import programs as P
from tests.ranks.scenarios import equal_states
from tests.several_processes import on_ranks, said_by

# Ranks compute with one thread each, and this process perhaps with more.
pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint was saved with")


class Experts(nn.Module):
    """A stack whose matrices have different owners, a tied weight and what is updated entry by entry."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 16, 16) / 4)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for expert in self.experts:
            x = x if x.shape[-1] == 16 else self.first(x)
            x = x + x @ expert
        return self.second(x)


def _step(world: int, seed: int = 0, shard: str | None = None) -> Any:
    torch.manual_seed(seed)
    mesh = P.mesh_of(world) if world > 1 else None
    return P.step_of("sf_normuon", mesh, model=Experts(), shard=shard, force_spectral=["experts"])


def saves(rank: int, world: int, folder: str) -> Any:
    """At once, and in the background, while the next step is taken."""
    step = _step(world)
    for batch in P.whole_batches(2):
        step(*P.part(batch, rank, world))
    kept = step.state_dict()
    step.save(f"{folder}/now")
    saving = step.save(f"{folder}/later", asynchronous=True)
    step(*P.part(P.whole_batches(3)[2], rank, world))
    saving.result()
    return kept


def loads(rank: int, world: int, folder: str) -> Any:
    kept, found = torch.load(f"{folder}/kept.pt", weights_only=False), []
    for name, shard in (("now", "optimizer"), ("later", "replicate"), ("one", "optimizer")):
        step = _step(world, seed=3, shard=shard)
        step.load(f"{folder}/{name}")
        found.append(equal_states(step.state_dict(), kept))
    return found


def _saved(folder: Path, world: int) -> Any:
    kept = on_ranks(world, saves, str(folder))[0]
    torch.save(kept, folder / "kept.pt")
    for name in ("now", "later"):
        one = _step(1, seed=5)
        one.load(folder / name)
        back = one.state_dict()
        for section in ("model", "optimizer", "counts"):
            assert back[section].keys() == kept[section].keys()
            assert all(torch.equal(t, kept[section][n]) for n, t in back[section].items())
    one.save(folder / "one", asynchronous=True).result()  # the folder of one process, which ranks load, too
    return kept


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # for torch's own reader
def test_saved_on_two_ranks_loaded_on_one_and_two_and_back(tmp_path: Path) -> None:
    kept = _saved(tmp_path, 2)
    assert on_ranks(2, loads, str(tmp_path)) == [[True, True, True]] * 2
    index = checkpoint_folder._read_index(tmp_path / "now", True)
    held = [file.stat().st_size for file in (tmp_path / "now" / index["files"]["parts"]).glob("*.distcp")]
    assert len(held) == 2 and max(held) < 2 * min(held)  # each rank wrote what it owns
    model = {"model": Experts().state_dict()}  # torch's own reader finds the weights by name
    reading: Any = dcp
    reading.load(model, checkpoint_id=tmp_path / "now" / index["files"]["parts"], no_dist=True)
    assert all(torch.equal(t, kept["model"][n]) for n, t in model["model"].items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("saved", "loaded"), [(2, 4), (4, 2), (4, 4)])
def test_between_two_and_four_ranks(tmp_path: Path, saved: int, loaded: int) -> None:
    _saved(tmp_path, saved)  # four ranks divide three matrices among two, and two have a copy
    assert on_ranks(loaded, loads, str(tmp_path)) == [[True, True, True]] * loaded


def ends_in_a_save(rank: int, world: int, folder: str) -> None:
    step = _step(world)
    step(*P.part(P.whole_batches(1)[0], rank, world))
    step.save(folder)
    step(*P.part(P.whole_batches(1)[0], rank, world))
    if rank == 1:
        writing: Any = dcp
        writer = writing.FileSystemWriter
        writer.write_data = lambda *given: os._exit(9)
    Path(folder, f".said{rank}").write_text(said_by(lambda: step.save(folder)))


def test_a_rank_that_ends_in_a_save_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\[rank 1 of 2\] died without a word, with exit code 9"):
        on_ranks(2, ends_in_a_save, str(tmp_path))
    said = (tmp_path / ".said0").read_text()
    assert "was not saved, because a file could not be written (another rank has ended, or does not come" in said
    assert "the checkpoint that was there is whole" in said
    step = _step(1)
    step.load(tmp_path)
    assert step.steps_called == 1
    step.save(tmp_path)  # and what the other left is cleared away
    assert sorted(file.name.partition("-")[0] for file in tmp_path.iterdir() if file.name[0] != ".") == [
        "checkpoint.json",
        "model",
        "state",
    ]


def saves_once(rank: int, world: int, folder: str) -> None:
    step = _step(world)
    step(*P.part(P.whole_batches(1)[0], rank, world))
    step.save(folder)


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    on_ranks(2, saves_once, str(tmp_path))
    (part,) = tmp_path.glob("parts-*/__1_0.distcp")
    whole = bytearray(part.read_bytes())
    whole[len(whole) // 2] ^= 1
    part.write_bytes(bytes(whole))
    with pytest.raises(ValueError, match="is damaged"):
        _step(1).load(tmp_path)
