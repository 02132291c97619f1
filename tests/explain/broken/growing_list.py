"""Every call appends to a list that the program reads."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.explain.example import Example

EXPECTED = {"kind": "growing_state", "line_contains": "history.append("}


def broken() -> Example:
    history: list[Tensor] = []

    def smoothed(loss: Tensor) -> Tensor:
        history.append(loss)
        return torch.stack(history).mean()

    loss = torch.randn(())
    return Example(smoothed, (loss,), ((loss,), (loss,)))


def repaired() -> Example:
    def smoothed(loss: Tensor, history: Tensor) -> Tensor:
        return torch.cat([history[1:], loss[None]])

    loss, history = torch.randn(()), torch.zeros(8)
    return Example(smoothed, (loss, history), ((loss, history), (loss, history)))
