"""Small training programs that leave something behind, and a rehearsal of them on clones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fusion_compile._capture.rehearsal.rehearsal import Rehearsal, rehearse

Loss = Callable[..., Tensor]


class Part(nn.Module):
    """A module whose forward and attributes are given."""

    def __init__(self, forward: Callable[..., Tensor], **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def around(part: nn.Module) -> nn.Sequential:
    """Inputs ``[8, 4]``, `part` over ``[8, 8]``, outputs ``[8, 2]``."""
    return nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 2))


def mse(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, *data: Any) -> Tensor:
        """The loss, and its backward while the clones are still in the modules: recomputation reads them."""
        value = self.loss(self.model, *data)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.autograd.grad(value, trained, allow_unused=True)
        return value


def rehearsed(model: nn.Module, loss: Loss = mse, data: tuple[Any, ...] | None = None) -> Rehearsal:
    """A rehearsal of loss and gradients, on clones of the weights, the buffers and the batch."""
    data = batch() if data is None else data
    program = _Loss(model, loss)
    weights = {n: p.detach().clone().requires_grad_(p.requires_grad) for n, p in program.named_parameters()}
    buffers = {n: b.clone() for n, b in program.named_buffers() if n.startswith("model.")}
    inputs = [value for value in data if isinstance(value, Tensor)]

    def run() -> Tensor:
        return functional_call(program, {**weights, **buffers}, data)

    return rehearse({"model": model, "loss_fn": loss}, run, inputs, [*weights.values(), *buffers.values()])


def kinds(rehearsal: Rehearsal) -> dict[str, str]:
    """Label -> kind."""
    return {record.label: record.kind.value for record in rehearsal.left}
