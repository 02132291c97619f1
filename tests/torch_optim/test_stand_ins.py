"""Tests: parameters that lie in every way that FSDP2 and tensor parallelism have are updated as whole ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.several_processes import on_ranks
from tests.sharded_models import (
    batches,
    difference,
    differing_state,
    full,
    give,
    loss_of,
    made,
    mesh_of,
    net,
    sharded,
    train_both,
)


def options_of_fully_shard(rank: int, world: int) -> None:
    """What FSDP2 does with weights between steps is its own matter: parts stay where they are."""
    for options in (
        {"reshard_after_forward": False, "offload_policy": CPUOffloadPolicy(pin_memory=False)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    ):
        whole, model = net(), sharded(net(), mesh_of(world), **options)
        theirs, ours = made(whole, "sf_normuon"), made(model, "sf_normuon")
        for x, y in batches(3, world):
            theirs.zero_grad()
            loss_of(model, x.chunk(world)[rank], y.chunk(world)[rank]).backward()
            for (_, p), q in zip(whole.named_parameters(), model.parameters(), strict=True):
                assert isinstance(q.grad, DTensor)
                p.grad = q.grad.full_tensor()
            theirs.step()
            ours.step()
            ours.zero_grad()
        assert difference(whole, model) == 0.0, options


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(140, 132)
        self.layer = nn.Linear(132, 132)
        self.head = nn.Linear(132, 140, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.layer(self.embed(tokens))))


def tied_weights(rank: int, world: int) -> None:
    torch.manual_seed(0)
    whole, model = Tied(), Tied()
    model.load_state_dict(whole.state_dict())
    fully_shard(model, mesh=mesh_of(world))
    theirs, ours = made(whole, "muon"), made(model, "muon")
    for _ in range(2):
        tokens = torch.randint(140, (4, 6))
        theirs.zero_grad()
        F.cross_entropy(whole(tokens).flatten(0, 1), tokens.flatten()).backward()
        give(model, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})
        theirs.step()
        ours.step()
    assert difference(whole, model) == 0.0
    assert len(ours.state) == len(list(model.parameters())) == 3


def convolutions(rank: int, world: int) -> None:
    """A convolution's rows are its first axis; ``channels_last`` keeps its order on each rank."""
    torch.manual_seed(0)
    for form in (torch.contiguous_format, torch.channels_last):
        whole = nn.Sequential(nn.Conv2d(16, 130, 3), nn.GELU(), nn.Conv2d(130, 130, 3), nn.Flatten(), nn.Linear(520, 3))
        if form == torch.channels_last:
            nn.Module.to(whole, memory_format=torch.channels_last)  # type: ignore[call-overload]
        model = nn.Sequential(nn.Conv2d(16, 130, 3), nn.GELU(), nn.Conv2d(130, 130, 3), nn.Flatten(), nn.Linear(520, 3))
        model.load_state_dict(whole.state_dict())
        mesh = mesh_of(world)
        for n, p in model.named_parameters():
            owner, _, key = n.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        theirs, ours = made(whole, "muon"), made(model, "muon")
        for _ in range(2):
            theirs.zero_grad()
            whole(torch.randn(2, 16, 6, 6)).square().mean().backward()
            give(model, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})
            theirs.step()
            ours.step()
        assert difference(whole, model) <= 1e-7, form  # columns are summed in the order of memory
        assert {n: tuple(full(p).shape) for n, p in model.named_parameters()}["2.weight"] == (130, 130, 3, 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(132, 264), nn.Linear(264, 132)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


def _blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 132), Block(), Block(), nn.Linear(132, 3))


PLAN: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def _tensor_parallel(model: nn.Sequential, mesh: DeviceMesh) -> nn.Sequential:
    for block in list(model)[1:3]:
        parallelize_module(block, mesh, PLAN)
    return model


def tensor_parallel(rank: int, world: int) -> None:
    """Matrices cut along rows and along columns; all ranks see the same batch, and their gradients are exact."""
    whole, model = _blocks(), _tensor_parallel(_blocks(), mesh_of(world))
    theirs, ours = made(whole, "sf_normuon"), made(model, "sf_normuon")
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0
    assert differing_state(theirs, ours) == []
    x, y = next(batches(1, 1))
    theirs.zero_grad()
    for m, o in ((whole, theirs), (model, ours)):
        loss_of(m, x, y).backward()
        o.step()
    assert difference(whole, model) < 1e-5  # its products are sums over ranks, in another order


def sharded_tensor_parallel(rank: int, world: int) -> None:
    """FSDP2 over tensor parallelism: parts of parts, blocks of a grid."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "tensor"))
    whole, model = _blocks(), _tensor_parallel(_blocks(), mesh["tensor"])
    for block in list(model)[1:3]:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    theirs, ours = made(whole, "sf_normuon"), made(model, "sf_normuon")
    train_both(whole, theirs, model, ours)
    assert difference(whole, model) == 0.0
    assert differing_state(theirs, ours) == []


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts_up = nn.Parameter(torch.randn(experts, 132, 130) / 11)
        self.experts_down = nn.Parameter(torch.randn(experts, 130, 132) / 11)


def experts(rank: int, world: int) -> None:
    """A stack that is cut between its matrices is updated where it lies; one that is cut within them travels."""
    for count, placement in (
        (8, Shard(0)),
        (5, Shard(0)),
        (2, Shard(0)),
        (4, Shard(1)),
        (4, Shard(2)),
        (4, Replicate()),
    ):
        torch.manual_seed(0)
        whole = Experts(count)
        model = Experts(count)
        mesh = mesh_of(world)
        for n, p in list(whole.named_parameters()):
            setattr(model, n, nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [placement])))
        theirs, ours = made(whole, "normuon"), made(model, "normuon")
        for _ in range(2):
            gradients = {n: torch.randn(p.shape) for n, p in whole.named_parameters()}
            for n, p in whole.named_parameters():
                p.grad = gradients[n]
            give(model, gradients)
            theirs.step()
            ours.step()
        assert difference(whole, model) == 0.0, (count, placement)
        held = next(iter(ours._inside.groups())).stand_ins.held.values()  # type: ignore[attr-defined]
        within = isinstance(placement, Shard) and placement.dim > 0
        assert all((h.owner is not None) is within for h in held)
        assert differing_state(theirs, ours) == []


def rows_that_are_not_reduced(rank: int, world: int) -> None:
    """A gradient that lies otherwise than its parameter is brought to it."""
    mesh = mesh_of(world)
    whole, model = nn.Linear(132, 130, bias=False), nn.Linear(132, 130, bias=False)
    torch.manual_seed(0)
    weight = torch.randn(130, 132)
    whole.weight = nn.Parameter(weight.clone())
    model.weight = nn.Parameter(distribute_tensor(weight.clone(), mesh, [Shard(0)]))
    theirs, ours = made(whole, "muon", force_spectral=["weight"]), made(model, "muon", force_spectral=["weight"])
    whole.weight.grad = torch.randn(130, 132)
    model.weight.grad = distribute_tensor(whole.weight.grad.clone(), mesh, [Shard(1)])
    theirs.step()
    ours.step()
    assert difference(whole, model) == 0.0


TWO = [
    options_of_fully_shard,
    tied_weights,
    convolutions,
    tensor_parallel,
    experts,
    rows_that_are_not_reduced,
]


@pytest.mark.parametrize("case", TWO)
def test_on_two_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(2, case)


def test_on_four_ranks() -> None:
    on_ranks(4, sharded_tensor_parallel)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", TWO)
def test_all_on_four_ranks(case: Callable[[int, int], None]) -> None:
    on_ranks(4, case)
