"""Small models and batches for steps on several ranks, and the one process with which they are compared."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusion_compile as fc
from fusion_compile import optim

SPECTRAL = [r"blocks\.\d+\.[abc]\.weight"]
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: "adamw",
    "muon": lambda: optim.muon(lr=0.02, matmul_dtype=torch.float32),
    "normuon": lambda: optim.normuon(matmul_dtype=torch.float32),
    "sf_normuon": lambda: optim.sf_normuon(matmul_dtype=torch.float32),
}


class Net(nn.Module):
    """Five residual blocks of three matrices, in banks of 5, and flat parameters around them."""

    def __init__(self, width: int = 16, depth: int = 5) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, width), nn.Linear(width, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "n": nn.LayerNorm(width),
                    "a": nn.Linear(width, width),
                    "b": nn.Linear(width, 2 * width),
                    "c": nn.Linear(2 * width, width),
                }
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block["c"](F.gelu(block["b"](block["a"](block["n"](x)))))  # type: ignore[index]
        return self.last(x)


def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    out = model(x)
    return F.mse_loss(out, y), {"mae": (out.detach() - y).abs().mean()}


def net(seed: int = 0, **sizes: int) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


def step_of(
    optimizer: str, mesh: Any = None, *, model: nn.Module | None = None, loss: Any = loss_fn, **options: Any
) -> fc.TrainingStep:
    """A step with fp32 Newton-Schulz; uncaptured unless `options` give a backend."""
    given = {
        "mode": "eager",
        "clip_grad_norm": 0.5,
        "force_spectral": () if optimizer in ("adamw", "lion", "sf_adamw") else SPECTRAL,
    }
    if "backend" in options:
        del given["mode"]
    return fc.compile_training_step(
        model or net(),
        loss,
        optimizer=OPTIMIZERS.get(optimizer, lambda: optimizer)(),
        mesh=mesh,
        **{**given, **options},
    )


def mesh_of(world: int) -> Any:
    return init_device_mesh("cpu", (world,))


def whole_batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 8, generator=source), torch.randn(size, 8, generator=source)) for _ in range(count)]


def part(batch: tuple[Tensor, ...], rank: int, world: int) -> tuple[Tensor, ...]:
    return tuple(t.chunk(world)[rank] for t in batch)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def same_everywhere(tensor: Tensor) -> bool:
    """Whether every rank has these bits."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return all(torch.equal(found[0], other) for other in found)
