"""Tests: what is saved on some ranks is loaded on any number of them, and without torch.distributed, bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fusion_compile.torch_optimizer import TorchOptimizer
from tests.several_processes import on_ranks
from tests.sharded_models import difference, differing_state, full, made, mesh_of, net, sharded, train_both

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SAVED = {"sf_normuon": None, "adafactor": FLAT}
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def _save(model: nn.Module, optimizer: TorchOptimizer, path: Path, options: Any = None) -> None:
    optimizer.eval()
    state: Any = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    saving: Any = dcp  # torch gives it no types
    saving.save(state, checkpoint_id=path)
    optimizer.train()


def _load(model: nn.Module, optimizer: TorchOptimizer, path: Path, options: Any = None) -> None:
    optimizer.eval()
    state: Any = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer, options=options),
    }
    loading: Any = dcp
    loading.load(state, checkpoint_id=path)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"], options=options)
    optimizer.train()


def save(rank: int, world: int, folder: str) -> None:
    for name, options in SAVED.items():
        whole, model = net(), sharded(net(), mesh_of(world))
        theirs, ours = made(whole, name), made(model, name)
        train_both(whole, theirs, model, ours)
        _save(model, ours, Path(folder, name), options)
        theirs.eval()
        if rank == 0:
            torch.save([whole.state_dict(), theirs.state_dict()], Path(folder, f"{name}.pt"))
        theirs.train()


def load(rank: int, world: int, folder: str) -> None:
    for name in SAVED:
        _loads_and_goes_on(net(), sharded(net(), mesh_of(world)), name, folder)


def _loads_and_goes_on(whole: nn.Module, model: nn.Module, name: str, folder: str) -> None:
    weights, state = torch.load(Path(folder, f"{name}.pt"), weights_only=False)
    theirs, ours = made(whole, name), made(model, name)
    theirs.eval()
    whole.load_state_dict(weights)
    theirs.load_state_dict(state)
    _load(model, ours, Path(folder, name), SAVED[name])
    theirs.train()
    assert difference(whole, model) == 0.0, name
    assert differing_state(theirs, ours) == [], name
    assert [g["steps"] for g in ours.param_groups] == [3]
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0, name


def whole_state_dicts(rank: int, world: int) -> None:
    """Full state dicts go to a plain optimizer and come back, on all ranks or from the first one alone."""
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = made(whole, "normuon"), made(model, "normuon")
    train_both(whole, theirs, model, ours)
    state = get_optimizer_state_dict(model, ours, options=WHOLE)
    if rank == 0:
        named: Any = state["state"]
        indices = {i: n for i, (n, _) in enumerate(whole.named_parameters())}
        kept = theirs.state_dict()["state"]
        assert all(torch.equal(named[indices[i]][k], v) for i in kept for k, v in kept[i].items())
    for everywhere in (True, False):
        again = sharded(net(), mesh_of(world))
        set_model_state_dict(again, get_model_state_dict(model))
        other = made(again, "normuon")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=not everywhere)
        whole_state = get_optimizer_state_dict(model, ours, options=StateDictOptions(full_state_dict=True))
        set_optimizer_state_dict(again, other, whole_state if everywhere or rank == 0 else {}, options=options)
        assert differing_state(theirs, other) == [], everywhere


def plain_state_dicts(rank: int, world: int) -> None:
    """``load_state_dict`` takes DTensors, and the state of one process; what does not fit is refused."""
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = made(whole, "sf_normuon"), made(model, "sf_normuon")
    train_both(whole, theirs, model, ours)
    for state in (ours.state_dict(), theirs.state_dict()):
        again = sharded(net(), mesh_of(world))
        other = made(again, "sf_normuon")
        with torch.no_grad():
            for p, q in zip(again.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        other.load_state_dict(copy.copy(state))
        assert differing_state(theirs, other) == []
        assert difference(whole, again) == 0.0
    bad = theirs.state_dict()
    bad["state"][2] = {k: v[:4] if v.ndim else v for k, v in bad["state"][2].items()}
    with pytest.raises(ValueError, match=r"mismatched .* of 2.weight: \[4, 130\] in the checkpoint, \[130, 130\] here"):
        ours.load_state_dict(bad)
    assert differing_state(theirs, ours) == []


def form_is_asked_for(rank: int, world: int) -> None:
    """The state dict of an optimizer before its first step changes neither weights nor counts."""
    model, untouched = sharded(net(), mesh_of(world)), net()
    ours = made(model, "sf_normuon")
    state = get_optimizer_state_dict(model, ours)
    assert set(state["state"]) == {n for n, _ in model.named_parameters()}
    assert difference(untouched, model) == 0.0
    assert ours.param_groups[0]["steps"] == 0
    train_both(untouched, theirs := made(untouched, "sf_normuon"), model, ours)
    assert differing_state(theirs, ours) == []


def state_by_parameter_has_the_same_names_everywhere(rank: int, world: int) -> None:
    model, whole = sharded(net(), mesh_of(world)), net()
    ours = made(model, "muon")
    train_both(whole, made(whole, "muon"), model, ours)
    names: list[Any] = [None] * world
    torch.distributed.all_gather_object(names, [sorted(ours.state[p]) for p in model.parameters()])
    assert all(n == names[0] and all(n) for n in names)


@pytest.mark.parametrize(
    "case",
    [whole_state_dicts, plain_state_dicts, form_is_asked_for, state_by_parameter_has_the_same_names_everywhere],
)
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # it is one process
def test_saved_on_two_ranks_loaded_on_one_two_and_four(tmp_path: Path) -> None:
    on_ranks(2, save, str(tmp_path))
    for world in (2, 4):
        on_ranks(world, load, str(tmp_path))
    for name in SAVED:
        _loads_and_goes_on(net(), net(), name, str(tmp_path))


def test_the_form_of_a_plain_optimizer_is_asked_for() -> None:
    model, untouched = net(), net()
    ours = made(model, "sf_normuon")
    state = get_optimizer_state_dict(model, ours)
    assert set(state["state"]) == {n for n, _ in model.named_parameters()}
    assert difference(untouched, model) == 0.0
    assert ours.param_groups[0]["steps"] == 0
    assert all(full(p).isfinite().all() for p in model.parameters())
