"""What a forward leaves to its backward, in bytes, and which memory operators write."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._compat import fake_mode
from fusion_compile._step._compat import MemorySeen, StatisticsSeen, WritesSeen


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


def test_statistics_of_a_batch_norm_are_seen_in_training_only() -> None:
    norm = nn.BatchNorm1d(3)
    with StatisticsSeen() as seen:
        norm(torch.randn(4, 3))
    assert {id(t) for t in seen.tensors} == {id(norm.running_mean), id(norm.running_var)}
    with StatisticsSeen() as seen:
        norm.eval()(torch.randn(4, 3))
    assert seen.tensors == []


def test_writes_are_seen_through_views_and_data() -> None:
    through_view, through_data, read = torch.zeros(4, 2), torch.zeros(3), torch.zeros(3)
    with WritesSeen() as seen:
        through_view[1:].t().add_(1)
        through_data.data.clamp_(min=read.sum())
    assert seen.holds(through_view) and seen.holds(through_data) and not seen.holds(read)
