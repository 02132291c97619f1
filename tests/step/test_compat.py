"""MemorySeen: what a forward leaves to its backward, in bytes."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._compat import fake_mode
from fusion_compile._step._compat import MemorySeen


def left_by(model: nn.Module, rows: int) -> int:
    with fake_mode() as mode:
        leaves = {n: mode.from_tensor(p.detach()).requires_grad_() for n, p in model.named_parameters()}
        x = torch.empty(rows, 4)
        with MemorySeen(leaves.values()) as seen:
            out = torch.func.functional_call(model, leaves, (x,))
            return seen.alive() - out.untyped_storage().nbytes()


def test_counts_what_the_backward_will_read_and_not_what_is_gone() -> None:
    # tanh keeps its result, 16 entries a row; the linear layer's own result is gone, and the weights are known.
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    assert left_by(model, rows=10) == 10 * 16 * 4


def test_a_view_counts_once() -> None:
    # The normalization reads the linear layer's result through a view.
    model = nn.Sequential(nn.Linear(4, 16), nn.Unflatten(1, (4, 4)), nn.Softmax(-1))
    with torch.no_grad():
        assert left_by(model, rows=10) == 0
    assert left_by(model, rows=10) == 0  # softmax keeps its result, which is the output
