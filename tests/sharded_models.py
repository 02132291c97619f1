"""Models whose parameters lie on several ranks beside the same model whole, and what is compared of the two."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fusion_compile import optim
from fusion_compile.optim import as_torch_optimizer
from fusion_compile.torch_optimizer import TorchOptimizer

IN_FP32 = ("muon", "normuon", "sf_normuon", "adamuon", "adamuon_sign", "fusion", "kempner_muon", "full_fusion")
"""Recipes with Newton-Schulz; in bf16 its products would be compared and not where they are taken."""


def mesh_of(world: int) -> DeviceMesh:
    return init_device_mesh("cpu", (world,))


def net(width: int = 130, matrices: int = 3, out: int = 3) -> nn.Sequential:
    """Matrices whose rows no number of ranks divides, fewer than four, and a last layer of fewer rows than ranks."""
    torch.manual_seed(0)
    middle = [layer for _ in range(matrices) for layer in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(nn.Linear(16, width), nn.GELU(), *middle, nn.Linear(width, out))


def sharded(model: nn.Module, mesh: DeviceMesh, **options: Any) -> Any:
    """`model` after ``fully_shard`` of each layer and of the whole."""
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def batches(steps: int, world: int, each: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(each * world, 16, generator=generator),
            torch.randn(each * world, 3, generator=generator),
        )


def choice(name: str, **options: Any) -> Any:
    """A recipe by name, with Newton-Schulz in fp32."""
    if name in IN_FP32 and name not in ("full_fusion",):
        options["matmul_dtype"] = torch.float32
    return partial(getattr(optim, name), **options) if options else name


def made(model: Any, name: str, **options: Any) -> TorchOptimizer:
    return as_torch_optimizer(model, choice(name), mode="eager", **options)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def give(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Set the gradients of a sharded model to parts of `gradients`."""
    for name, p in model.named_parameters():
        g = gradients[name]
        if isinstance(p, DTensor):
            g = distribute_tensor(g.clone(), p.device_mesh, p.placements, src_data_rank=None)
        p.grad = g.clone()


def train_both(
    whole: nn.Module,
    theirs: TorchOptimizer,
    model: nn.Module,
    ours: TorchOptimizer,
    steps: int = 3,
    each: Callable[[], None] = lambda: None,
) -> None:
    """Take the same steps on both, with the very same gradients."""
    for x, y in batches(steps, 1):
        theirs.zero_grad()
        loss_of(whole, x, y).backward()
        give(model, {n: p.grad for n, p in whole.named_parameters() if p.grad is not None})
        each()
        theirs.step()
        ours.step()
        ours.zero_grad()


def full(t: Any) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def difference(whole: nn.Module, model: nn.Module) -> float:
    """The largest difference of a weight."""
    own = dict(model.named_parameters())
    return max(
        (full(own[n]).detach().double() - p.detach().double()).abs().max().item() for n, p in whole.named_parameters()
    )


def differing_state(theirs: TorchOptimizer, ours: TorchOptimizer) -> list[str]:
    """Which parts of the state differ in a bit, or are missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*state_dict\(\) was taken in train mode")  # to look at it
        a, b = theirs.state_dict()["state"], ours.state_dict()["state"]
    found = [f"{i}: {set(a[i]) ^ set(b.get(i, ()))}" for i in a if set(a[i]) != set(b.get(i, ()))]
    found += [f"{i} {k}" for i in a for k in a[i].keys() & b[i].keys() if not torch.equal(full(b[i][k]), a[i][k])]
    return found


def equal_on_all(t: Tensor) -> bool:
    """Whether a plain tensor is the same on all ranks."""
    rows = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, t.contiguous())
    return all(torch.equal(row, rows[0]) for row in rows)
