"""Tests: a group of parameters on several ranks is updated as one of whole parameters, bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fusion_compile.optim._registry import names
from tests.several_processes import on_ranks
from tests.sharded_models import (
    batches,
    difference,
    differing_state,
    give,
    loss_of,
    made,
    mesh_of,
    net,
    sharded,
    train_both,
)

POOLED = ("prodigy", "autokaon", "fusionopt_compat")


def updates_as_the_whole(name: str, world: int) -> None:
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = made(whole, name), made(model, name)
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0, name
    theirs.eval()
    ours.eval()
    assert difference(whole, model) == 0.0, name
    if not any(group.plan.transform.diagnostics for group in theirs._inside.groups()):  # a rank measures its own
        assert differing_state(theirs, ours) == [], name


def few_recipes(rank: int, world: int) -> None:
    for name in ("adamw", "sf_normuon", "adafactor"):
        updates_as_the_whole(name, world)


def all_recipes(rank: int, world: int) -> None:
    for name in names():
        if name not in POOLED:
            updates_as_the_whole(name, world)


def shares_out(rank: int, world: int) -> None:
    """Every matrix has one owner, what is elementwise stays where it lies, and a rank without anything has a copy."""
    model = sharded(net(), mesh_of(world))
    ours = made(model, "muon")
    whole = net()
    train_both(whole, made(whole, "muon"), model, ours, steps=1)
    group = next(iter(ours._inside.groups()))
    matrices = [n for n, p in group.members.items() if tuple(p.shape) == (130, 130)]
    counts = [torch.zeros(1) for _ in range(world)]
    torch.distributed.all_gather(counts, torch.tensor([float(len(matrices))]))
    assert sum(c.item() for c in counts) == 3
    assert max(c.item() for c in counts) == -(-3 // world)
    assert group.members["0.weight"].shape[0] <= -(-130 // world)


def copies_and_shards(rank: int, world: int) -> None:
    """HSDP: the parts lie in the second dimension of the mesh, and both rows of ranks compute the same."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("copies", "shards"))
    whole, model = net(), sharded(net(), mesh)
    theirs, ours = made(whole, "sf_normuon"), made(model, "sf_normuon")
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0
    assert differing_state(theirs, ours) == []


def a_write_counts(rank: int, world: int) -> None:
    """Whichever way somebody writes a parameter between steps, the next step begins there."""
    for name in ("muon", "sf_normuon"):
        whole, model = net(), sharded(net(), mesh_of(world))
        theirs, ours = made(whole, name), made(model, name)
        train_both(whole, theirs, model, ours, steps=2)
        theirs.eval()
        ours.eval()
        for m in (whole, model):
            own = dict(m.named_parameters())
            with torch.no_grad():
                own["2.weight"].mul_(0.5)
            own["4.weight"].data.mul_(0.25)
            own["0.weight"].data.clamp_(-0.1, 0.1)
            if isinstance(own["0.bias"], DTensor):
                own["0.bias"].to_local().detach().zero_()
            else:
                own["0.bias"].data.zero_()
        theirs.train()
        ours.train()
        train_both(whole, theirs, model, ours, steps=2)
        assert difference(whole, model) == 0.0, name


def no_gradient_no_update(rank: int, world: int) -> None:
    """A parameter without a gradient stays, weights and state, and a frozen one joins when it first has one."""
    whole, model = net(), sharded(net(), mesh_of(world))
    whole[2].requires_grad_(False)
    model[2].requires_grad_(False)
    theirs, ours = made(whole, "normuon"), made(model, "normuon")

    def without(which: str) -> None:
        for m in (whole, model):
            for n, p in m.named_parameters():
                if n.startswith(which):
                    p.grad = None

    for frozen, lacking in ((True, "4."), (False, "nothing"), (False, "6.")):
        whole[2].requires_grad_(not frozen)
        model[2].requires_grad_(not frozen)
        train_with(whole, theirs, model, ours, partial(without, lacking))
        assert difference(whole, model) == 0.0, (frozen, lacking)
    assert differing_state(theirs, ours) == []


def train_with(whole: Any, theirs: Any, model: Any, ours: Any, each: Callable[[], None]) -> None:
    for x, y in batches(2, 1):
        theirs.zero_grad()
        loss_of(whole, x, y).backward()
        given = {n: p.grad if p.grad is not None else torch.zeros(p.shape) for n, p in whole.named_parameters()}
        give(model, given)
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            if p.grad is None:
                q.grad = None
        each()
        theirs.step()
        ours.step()
        ours.zero_grad()


def half_precision(rank: int, world: int) -> None:
    for how in ("master", "stochastic", "kahan", "exact", "round"):
        whole, model = net().bfloat16(), sharded(net().bfloat16(), mesh_of(world))
        theirs, ours = (made(m, "adamw", half_precision=how) for m in (whole, model))
        for x, y in batches(3, 1):
            theirs.zero_grad()
            loss_of(whole, x.bfloat16(), y.bfloat16()).backward()
            give(model, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})
            theirs.step()
            ours.step()
        if how != "stochastic":  # which draws for each entry by its place in its bank
            assert difference(whole, model) == 0.0, how


@pytest.mark.parametrize("case", [few_recipes, shares_out, a_write_counts, no_gradient_no_update, half_precision])
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


@pytest.mark.parametrize("case", [shares_out, copies_and_shards])
def test_on_four_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(4, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [2, 4])
def test_every_recipe(world: int) -> None:
    on_ranks(world, all_recipes)
