"""A training step that is slower than it looks, and the same step repaired: what docs/explain.md walks through.

    fusion-compile explain examples.explain_a_slow_step:slow --steps 4 --html slow.html --json slow.json
    fusion-compile explain examples.explain_a_slow_step:repaired --steps 4 --json repaired.json
    fusion-compile diff slow.json repaired.json

Both train a small denoiser by rectified flow with momentum; `torch.compile` takes either without an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1000
DECAY = 0.999
MOMENTUM = 0.9


class Denoiser(nn.Module):
    """One transformer block over tokens ``[B, N, width]`` at noise levels ``[B, 1, 1]``."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h = x + self.level(sigma)
        q, k, v = self.qkv(self.norm(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = h + self.mlp(h)
        return out


class SlowTrainer:
    """As one writes it first."""

    def __init__(self, model: nn.Module, lr: float = 0.02) -> None:
        self.model = model
        self.weights: list[Any] = list(model.parameters())
        self.momenta = [torch.zeros_like(w) for w in self.weights]
        self.lr = lr
        self.losses: list[float] = []

    def step(self, clean: Tensor) -> float:
        """One step on ``[B, N, width]``; the mean of the last hundred losses."""
        sigmas = torch.linspace(0, 1, LEVELS).to(clean.device)
        sigma = sigmas[torch.randint(LEVELS, (len(clean), 1, 1), device=clean.device)]
        noise = torch.randn_like(clean)
        predicted = self.model(clean + sigma * (noise - clean), sigma)
        loss = F.mse_loss(predicted, noise - clean)

        self.model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight, momentum in zip(self.weights, self.momenta, strict=True):
                momentum.mul_(MOMENTUM).add_(weight.grad)
                weight.sub_(self.lr * momentum)

        self.lr *= DECAY
        self.losses.append(loss.item())
        recent = self.losses[-100:]
        return sum(recent) / len(recent)


class Trainer:
    """The same step with nothing in it that a CUDA graph cannot hold."""

    def __init__(self, model: nn.Module, lr: float = 0.02) -> None:
        self.model = model
        self.weights = list(model.parameters())
        self.momenta = [torch.zeros_like(w) for w in self.weights]
        device = self.weights[0].device
        self.lr = torch.tensor(lr, device=device)
        self.mean_loss = torch.zeros((), device=device)
        for tensor in (*self.momenta, self.lr, self.mean_loss):
            torch._dynamo.mark_static_address(tensor, guard=False)  # it is written in place and never bound anew

    def step(self, clean: Tensor) -> Tensor:
        """One step on ``[B, N, width]``; a running mean of the loss, 0-dim and on the device."""
        sigmas = torch.linspace(0, 1, LEVELS, device=clean.device)
        sigma = sigmas[torch.randint(LEVELS, (len(clean), 1, 1), device=clean.device)]
        noise = torch.randn_like(clean)
        predicted = self.model(clean + sigma * (noise - clean), sigma)
        loss = F.mse_loss(predicted, noise - clean)

        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for weight, momentum, gradient in zip(self.weights, self.momenta, gradients, strict=True):
                momentum.mul_(MOMENTUM).add_(gradient)
                weight.sub_(self.lr * momentum)

            self.lr.mul_(DECAY)
            return self.mean_loss.lerp_(loss.detach(), 0.01).clone()


def slow() -> tuple[Any, tuple[Tensor]]:
    """The step and the arguments of a call."""
    model, batch = _model_and_batch()
    return SlowTrainer(model).step, (batch,)


def repaired() -> tuple[Any, tuple[Tensor]]:
    """The repaired step, whose gradient Dynamo is told to trace, and the arguments of a call."""
    torch._dynamo.config.trace_autograd_ops = True
    model, batch = _model_and_batch()
    return Trainer(model).step, (batch,)


def _model_and_batch() -> tuple[Denoiser, Tensor]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Denoiser().to(device), torch.randn(8, 16, 64, device=device)
