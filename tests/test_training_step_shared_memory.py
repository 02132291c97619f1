"""Tensors that a loss keeps and that share memory: with each other, or with a parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import batches, compiled, torch_loop

pytestmark = pytest.mark.filterwarnings("ignore:the step is captured by running it")
WAYS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "read or run": {}, "run": {"capture": "run"}}


def model() -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(4, 2)


class FormerWeights:
    """Keeps the weights of the step before, without a copy: they are those of now."""

    def __init__(self, model: nn.Linear) -> None:
        self.former = model.weight.detach()

    def __call__(self, model: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        moved = (model.weight - self.former).square().sum()
        self.former = model.weight.detach()
        return (model(x) - y).square().mean() + moved + self.former.square().sum()


@pytest.mark.parametrize("way", WAYS)
def test_a_parameters_memory_is_followed(way: str) -> None:
    net = model()
    wanted = torch_loop(net, batches(4), FormerWeights(net), lr=0.1)
    net = model()
    step = compiled(net, FormerWeights(net), lr=0.1, **WAYS[way])
    losses = torch.stack([step(*batch).clone() for batch in batches(4)])
    torch.testing.assert_close(losses, torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_an_iterator_is_refused_without_a_rehearsal_too() -> None:
    weights = (float(i) for i in range(100))
    step = compiled(model(), lambda m, x, y: (m(x) - y).square().mean() * next(weights), mode="eager", rehearse=False)
    with pytest.raises(ValueError, match="gives other items at every forward and cannot be set back"):
        step(*batches(1)[0])
