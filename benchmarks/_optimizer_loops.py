"""Loops that differ in their optimizer alone: equal parameters, one loss, backward, ``step()``, ``zero_grad()``.

Each contender finds its gradients where its own backward has left them: torch's in ``.grad``, ours there too, or in the
banks into which hooks have moved them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusion_compile import TorchOptimizer, optim
from fusion_compile.optim import Transform

Shapes = Sequence[tuple[int, ...]]

ADAPTERS: Shapes = [(16, 640), (640, 16)] * 200
DIT_S: Shapes = [
    shape
    for _ in range(12)
    for shape in (
        (1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,), (2304, 384), (2304,),
    )
]  # fmt: skip
_ROWS = 8
"""Of the products that a matrix's gradient is the sum of."""


class Parameters(nn.Module):
    """Parameters of `shapes`, and a loss that is linear in each, so that all have a gradient and none diverges."""

    def __init__(self, shapes: Shapes, device: torch.device) -> None:
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.inputs: list[tuple[Tensor, Tensor]] = []
        for i, shape in enumerate(shapes):
            values = torch.randn(shape, generator=source) * 0.02
            self.register_parameter(f"p{i}", nn.Parameter(values.to(device)))
            x = torch.randn(_ROWS, shape[-1], generator=source) if len(shape) == 2 else torch.zeros(0)
            y = torch.randn(*([_ROWS] if len(shape) == 2 else []), shape[0], generator=source) * 1e-3
            self.inputs.append((x.to(device), y.to(device)))

    def loss(self) -> Tensor:
        total = torch.zeros((), device=self.inputs[0][0].device)
        for p, (x, y) in zip(self.parameters(), self.inputs, strict=True):
            total = total + ((x @ p.t() * y).sum() if p.ndim == 2 else (p * y).sum())
        return total


@dataclass(frozen=True)
class Loop:
    """`step`: the optimizer's, `kept`: what it keeps between two steps, the parameters among it."""

    model: Parameters
    step: Callable[[], object]
    zero_grad: Callable[[], object]
    kept: Callable[[], Iterator[Tensor]]

    def backward(self) -> None:
        self.model.loss().backward()  # type: ignore[no-untyped-call]

    def prepare(self) -> None:
        """Leave the gradients of a backward where they are."""
        self.zero_grad()
        self.backward()

    def whole(self) -> None:
        self.backward()
        self.step()
        self.zero_grad()


def ours(shapes: Shapes, transform: Transform, device: torch.device) -> Loop:
    """A torch optimizer of `transform`, compiled."""
    model = Parameters(shapes, device)
    optimizer = optim.as_torch_optimizer(model, transform)
    return Loop(model, optimizer.step, optimizer.zero_grad, lambda: _kept_by_ours(optimizer))


def _kept_by_ours(optimizer: TorchOptimizer) -> Iterator[Tensor]:
    for group in optimizer._inside.groups():  # the parameters are views of what it has in banks
        yield from group.state.values()
        yield from group._gradients._banks.values()
        yield from optimizer._inside.runs.memory(group.at)


def torchs(
    shapes: Shapes, make: Callable[[list[nn.Parameter]], Sequence[torch.optim.Optimizer]], device: torch.device
) -> Loop:
    """Optimizers that `make` makes of the parameters."""
    model = Parameters(shapes, device)
    optimizers = make([*model.parameters()])

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    def zero_grad() -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()

    def kept() -> Iterator[Tensor]:
        yield from model.parameters()
        for optimizer in optimizers:
            for state in optimizer.state.values():
                yield from (t for t in state.values() if isinstance(t, Tensor))

    return Loop(model, step, zero_grad, kept)


def backward_alone(shapes: Shapes, device: torch.device) -> Loop:
    """No step is taken."""
    model = Parameters(shapes, device)
    return Loop(model, lambda: None, model.zero_grad, lambda: iter(model.parameters()))


def adamw(shapes: Shapes, device: torch.device, **kind: bool) -> Loop:
    return torchs(shapes, lambda given: [torch.optim.AdamW(given, lr=1e-3, **kind)], device)


def prodigyopt(shapes: Shapes, device: torch.device) -> Loop:
    """The authors' Prodigy, which waits for the device twice a parameter."""
    from prodigyopt import Prodigy

    return torchs(shapes, lambda given: [Prodigy(given, lr=1.0)], device)


def muon(shapes: Shapes, device: torch.device) -> Loop:
    """``torch.optim.Muon`` on the matrices and fused AdamW on the rest."""

    def make(given: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
        rest = [p for p in given if p.ndim != 2]
        return [
            torch.optim.Muon([p for p in given if p.ndim == 2], lr=1e-3),
            torch.optim.AdamW(rest, lr=1e-3, fused=True),
        ]

    return torchs(shapes, make, device)
