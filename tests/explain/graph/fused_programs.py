"""Programs whose peak memory under Inductor was measured, forward alone and with the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64


class FusedProgram(NamedTuple):
    """`kept`: all tensors that live between calls. `mib`: the peak of a call that torch 2.13.0 compiled with Inductor
    for a CPU, from the profiler's record of every allocation (`benchmarks._measure.peak_of_call`)."""

    fn: Callable[..., Any]
    args: tuple[Tensor, ...]
    kept: list[Tensor]
    mib: float


class Attention(nn.Module):
    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.explicit = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), explicit

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        if self.explicit:
            y = (q @ k.transpose(-1, -2) * (width // 4) ** -0.5).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(False), mlp()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.first(x))
        return x + self.mlp(self.second(x))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.again = nn.BatchNorm2d(16), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = x + self.again(self.second(x)).relu()
        return F.max_pool2d(x, 2).mean((2, 3))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.scale
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, 16) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            h = convolution(F.silu(norm(h)))
        return x + h


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        later = torch.ones(128, 128, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(1, 2) / 8).masked_fill(later, float("-inf"))
        return scores.softmax(-1) @ v


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def tokens() -> Tensor:
    return torch.randn(8, 128, WIDTH)


def square(y: Tensor) -> Tensor:
    return y.square().mean()


def forward(model: nn.Module, x: Tensor, mib: float) -> FusedProgram:
    model.eval().requires_grad_(False)
    return FusedProgram(model, (x,), [x, *model.parameters(), *model.buffers()], mib)


def gradient(model: nn.Module, x: Tensor, mib: float, loss: Callable[[Tensor], Tensor] = square) -> FusedProgram:
    parameters = list(model.parameters())

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(model(x)), parameters)

    return FusedProgram(gradients, (x,), [x, *parameters, *model.buffers()], mib)


def two(make: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(make(), make())


def language_model() -> FusedProgram:
    ids = torch.randint(500, (4, 64))
    model = nn.Sequential(nn.Embedding(500, WIDTH), Block(), nn.Linear(WIDTH, 500))
    return gradient(model, ids, 2.388, lambda y: F.cross_entropy(y.flatten(0, 1), ids.flatten()))


def elementwise() -> FusedProgram:
    def program(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        softmax = (x * 2 + y).sin().softmax(-1)
        return (softmax - x).square().mean(), softmax.sum(1)

    x, y = tokens(), tokens()
    return FusedProgram(program, (x, y), [x, y], 0.760)


PROGRAMS: dict[str, Callable[[], FusedProgram]] = {
    "explicit attention": lambda: forward(Attention(True), tokens(), 1.813),
    "attention": lambda: forward(Attention(False), tokens(), 1.347),
    "convolutions and batch norm": lambda: forward(Convolutions(), torch.randn(4, 3, 64, 64), 2.224),
    "mlp": lambda: forward(mlp(), tokens(), 1.626),
    "blocks": lambda: forward(two(Block), tokens(), 2.631),
    "gated mlp and rms norm": lambda: forward(two(Gated), tokens(), 3.129),
    "residual convolutions": lambda: forward(two(Residual), torch.randn(4, 16, 32, 32), 1.061),
    "elementwise": elementwise,
    "gradient of explicit attention": lambda: gradient(Attention(True), tokens(), 5.595),
    "gradient of causal attention": lambda: gradient(Causal(), tokens(), 2.805),
    "gradient of attention": lambda: gradient(Attention(False), tokens(), 2.376),
    "gradient of convolutions": lambda: gradient(Convolutions(), torch.randn(4, 3, 64, 64), 7.396),
    "gradient of an mlp": lambda: gradient(mlp(), tokens(), 2.689),
    "gradient of blocks": lambda: gradient(two(Block), tokens(), 9.186),
    "gradient of a gated mlp": lambda: gradient(two(Gated), tokens(), 9.696),
    "gradient of a language model": language_model,
}
