"""Tests: what ranks must have in common is checked before anything changes, and what cannot be done is refused."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard

from fusion_compile import EMA, optim
from fusion_compile.optim import as_torch_optimizer
from tests.several_processes import on_ranks, said_by
from tests.sharded_models import (
    batches,
    difference,
    differing_state,
    equal_on_all,
    full,
    give,
    loss_of,
    made,
    mesh_of,
    net,
    sharded,
    train_both,
)


def _trained(world: int, name: str = "muon") -> tuple[nn.Module, Any, nn.Module, Any]:
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = made(whole, name), made(model, name)
    train_both(whole, theirs, model, ours, steps=2)
    return whole, theirs, model, ours


def one_rank_differs(rank: int, world: int) -> None:
    """Another number, a loaded state, a missing gradient: refused on all ranks, and nothing is changed."""
    whole, theirs, model, ours = _trained(world)
    x, y = next(batches(1, 1))
    loss_of(whole, x, y).backward()
    gradients = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}

    def refused(change: Callable[[], Any], undo: Callable[[], Any], says: str) -> None:
        give(model, gradients)
        if rank == 1:
            change()
        said = said_by(ours.step)
        assert said.startswith("RuntimeError: ranks differ in "), said
        assert says in said, said
        assert difference(whole, model) == 0.0
        if rank == 1:
            undo()
        assert differing_state(theirs, ours) == []

    group = ours.param_groups[0]
    lr = group["lr"]
    refused(
        lambda: group.update(lr=0.5),
        lambda: group.update(lr=lr),
        f"their numbers: rank 0 has lr={lr} in parameter group 0, rank 1 has lr=0.5 in parameter group 0.",
    )
    own = dict(model.named_parameters())
    held = own["2.weight"]
    refused(
        lambda: setattr(held, "grad", None),
        lambda: None,
        "which parameters have a gradient: rank 0 has no such entry, rank 1 has 2.weight has no gradient",
    )
    inside = ours._inside
    refused(
        lambda: setattr(inside, "loads", 1),
        lambda: setattr(inside, "loads", 0),
        "how often a state was loaded: rank 0 has 0, rank 1 has 1",
    )
    give(model, gradients)
    theirs.step()
    ours.step()
    assert difference(whole, model) == 0.0


def a_schedule_on_one_rank(rank: int, world: int) -> None:
    model = sharded(net(), mesh_of(world))
    lr = optim.cosine(1e-2, 10) if rank == 0 else optim.cosine(1e-2, 20)
    ours = as_torch_optimizer(model, optim.muon(lr, matmul_dtype=torch.float32), mode="eager")
    said = []
    for x, y in batches(2, 1):
        loss_of(model, x, y).backward()
        said.append(said_by(ours.step))
    assert said[0] == ""  # both begin alike
    assert "ranks differ in their numbers" in said[1]


def a_step_that_is_not_finite(rank: int, world: int) -> None:
    """A GradScaler that finds an infinite gradient on one rank leaves the step out on all of them."""
    model = sharded(net(), mesh_of(world))
    ours = made(model, "sf_normuon")
    scaler: Any = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i, (x, y) in enumerate(batches(3, world)):
        ours.zero_grad()
        before = [full(p).detach().clone() for p in model.parameters()]
        own = x.chunk(world)[rank].clone()
        if i == 1 and rank == 1:
            own[0, 0] = float("inf")
        scaler.scale(loss_of(model, own, y.chunk(world)[rank])).backward()
        scaler.step(ours)
        scaler.update()
        same = [torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True)]
        assert all(same) is (i == 1), (i, same)
    assert ours.param_groups[0]["steps"] == 2
    assert scaler.get_scale() == 4.0
    assert equal_on_all(torch.tensor(float(ours.param_groups[0]["steps"])))


def clipping_accumulation_and_closures(rank: int, world: int) -> None:
    whole, model = net(), sharded(net(), mesh_of(world))
    theirs, ours = made(whole, "normuon"), made(model, "normuon")
    for x, y in batches(3, world):
        for m, o, (a, b) in ((whole, theirs, (x, y)), (model, ours, (x.chunk(world)[rank], y.chunk(world)[rank]))):

            def closure(m: Any = m, o: Any = o, a: Any = a, b: Any = b) -> Any:
                o.zero_grad(set_to_none=False)
                for part in zip(a.chunk(2), b.chunk(2), strict=True):
                    (loss_of(m, *part) / 2).backward()
                norm = full(torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01))
                return norm

            norm = o.step(closure)
            assert norm > 0.01  # it does clip
    assert difference(whole, model) < 1e-6  # sums of gradients are taken in another order


def ordinary_backward(rank: int, world: int) -> None:
    for name in ("muon", "sf_normuon", "adamw"):
        whole, model = net(), sharded(net(), mesh_of(world))
        # Adam's first steps are all as long as lr, whatever the gradient, so its rounding counts by lr.
        theirs, ours = (made(m, name, lr=1e-4) for m in (whole, model))
        for o in (theirs, ours):
            o.param_groups[0].update({n: 1e-4 for n in o.param_groups[0] if n == "scalar_lr"})
        for x, y in batches(3, world):
            for m, o, (a, b) in ((whole, theirs, (x, y)), (model, ours, (x.chunk(world)[rank], y.chunk(world)[rank]))):
                o.zero_grad()
                loss_of(m, a, b).backward()
                o.step()
        assert difference(whole, model) < 1e-6, name


def some_parameters_are_plain(rank: int, world: int) -> None:
    """Layers without fully_shard: their gradients are the loop's to average, which is said if it does not."""
    whole, model = net(), net()
    for layer in list(model)[2:5]:
        fully_shard(layer, mesh=mesh_of(world)) if isinstance(layer, nn.Linear) else None
    theirs, ours = made(whole, "normuon"), made(model, "normuon")
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0
    assert differing_state(theirs, ours) == []
    x, y = next(batches(1, world))
    loss_of(model, x.chunk(world)[rank], y.chunk(world)[rank]).backward()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made(model, "adamw").step()
    assert any("0.weight [130, 16] is whole on every rank, and its gradient differs" in str(w.message) for w in said)


def refusals(rank: int, world: int) -> None:
    whole, _, model, ours = _trained(world)
    for act, says in (
        (partial(copy.deepcopy, ours), "TypeError: an optimizer of parameters on several ranks"),
        (partial(pickle.dumps, ours), "cannot be pickled: each rank has a part of its state"),
    ):
        assert says in said_by(act)
    x, y = next(batches(1, 1))
    loss_of(model, x, y).backward()
    average = as_torch_optimizer(model, "adamw", mode="eager", ema=EMA(decay=0.9))
    assert "ema=…: 0.weight [130, 16] is a DTensor" in said_by(average.step)
    assert "prodigy cannot update parameters that lie on several ranks" in said_by(made(model, "prodigy").step)
    clipped = as_torch_optimizer(model, optim.chain(optim.clip_by_global_norm(1.0), optim.adamw()), mode="eager")
    assert "because the norm of all gradients needs all parameters" in said_by(clipped.step)
    assert "release_gradients" in said_by(lambda: as_torch_optimizer(model, "adamw", release_gradients=True).step())
    p = next(model.parameters())
    p.grad = None
    given = said_by(lambda: setattr(p, "grad", torch.zeros(p.shape)))
    if not given:
        assert "is a Tensor [130, 16] and the parameter a DTensor" in said_by(made(model, "adamw").step)
    assert difference(whole, model) == 0.0


def parameters_that_were_replaced(rank: int, world: int) -> None:
    """An optimizer of parameters that fully_shard has replaced would never move a weight."""
    model = net()
    early = made(model, "adamw")
    sharded(model, mesh_of(world))
    x, y = next(batches(1, 1))
    loss_of(model, x, y).backward()
    assert "0.weight [130, 16] was replaced by another after the optimizer was made" in said_by(early.step)
    for p in model.parameters():
        p.grad = None
    made(model, "adamw").step()  # nothing to do


def state_that_was_dropped(rank: int, world: int) -> None:
    """On all ranks it starts afresh; on one of them it is refused on all."""
    whole, theirs, model, ours = _trained(world, "sf_normuon")
    theirs.state.clear()
    ours.state.clear()
    train_both(whole, theirs, model, ours, steps=2)
    assert difference(whole, model) == 0.0
    kept = dict(ours.state)
    if rank == 0:
        ours.state.clear()
    x, y = next(batches(1, 1))
    loss_of(model, x, y).backward()
    assert "what they do: rank 0 has step after state was dropped, rank 1 has step." in said_by(ours.step)
    ours.state.update(kept)
    assert said_by(ours.step) == ""


def parameter_groups(rank: int, world: int) -> None:
    """Groups of plain lists with numbers of their own, one of which joins later."""
    found: list[Any] = []
    for model in (net(), sharded(net(), mesh_of(world))):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups: Any = [{"params": matrices[:-1], "lr": 2e-3}, {"params": rest, "scalar_lr": 1e-3}]
        optimizer = as_torch_optimizer(
            groups, partial(optim.normuon, matmul_dtype=torch.float32), mode="eager", model=model
        )
        found += [model, optimizer, matrices[-1]]
    whole, theirs, last, model, ours, own_last = found
    train_both(whole, theirs, model, ours, steps=2)
    theirs.add_param_group({"params": [last], "scalar_lr": 1e-4})
    ours.add_param_group({"params": [own_last], "scalar_lr": 1e-4})
    theirs.param_groups[0]["lr"] = ours.param_groups[0]["lr"] = 5e-4
    train_both(whole, theirs, model, ours, steps=2)
    assert difference(whole, model) == 0.0
    assert differing_state(theirs, ours) == []


def no_numbers_to_look_at(rank: int, world: int) -> None:
    """What parts measure is of this rank's parameters; nothing is shown in the place of what all have."""
    model = sharded(net(), mesh_of(world))
    ours = made(model, "adamuon")
    x, y = next(batches(1, 1))
    F.mse_loss(model(x), y).backward()
    ours.step()
    assert ours.diagnostics == {}


CASES = [
    one_rank_differs,
    a_schedule_on_one_rank,
    a_step_that_is_not_finite,
    clipping_accumulation_and_closures,
    ordinary_backward,
    some_parameters_are_plain,
    refusals,
    parameters_that_were_replaced,
    state_that_was_dropped,
    parameter_groups,
    no_numbers_to_look_at,
]


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_on_four_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(4, case)
