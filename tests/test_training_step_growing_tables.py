"""Tables that grow with a new length: the programs that read the old one are captured again, within a bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small_models import compiled, torch_loop

pytestmark = pytest.mark.filterwarnings("ignore:the step is captured by running it", "ignore:this step ran uncaptured")
WAYS: dict[str, dict[str, Any]] = {"read or run": {}, "run": {"capture": "run"}, "eager": {"mode": "eager"}}


class Positions(nn.Module):
    """Keeps positions as `keep` says, and makes more of them for a longer text."""

    table: Tensor | None

    def __init__(self, *, buffer: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        if buffer:
            self.register_buffer("table", torch.zeros(0, 2), persistent=False)
        else:
            self.table = None

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        if self.table is None or self.table.shape[0] < length:
            self.table = torch.arange(length).float()[:, None].expand(length, 2) / 10
        out: Tensor = self.linear(x) + self.table[:length]
        return out


def error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def texts(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    source = torch.Generator().manual_seed(2)
    return [(torch.randn(2, n, 4, generator=source), torch.randn(2, n, 2, generator=source)) for n in lengths]


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    return make()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "attribute"])
def test_it_is_the_ordinary_loops(buffer: bool, way: str) -> None:
    data = texts([2, 3, 2, 3, 3])
    model = made(lambda: Positions(buffer=buffer))
    wanted = torch_loop(model, data, error)
    own = made(lambda: Positions(buffer=buffer))
    step = compiled(own, error, **WAYS[way])
    got = [step(*batch) for batch in data]
    for a, b in zip([*got, *own.parameters(), own.table], [*wanted, *model.parameters(), model.table], strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)  # AdamW's fused arithmetic rounds so


class Memory(nn.Module):
    """Longer after each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        self.seen = torch.cat([self.get_buffer("seen"), out.detach().mean((0, 1))[None]])
        return out - self.seen.mean(0)


def test_what_grows_at_each_step_is_refused_at_last_and_runs_uncaptured() -> None:
    data = texts([2] * 10)
    step = compiled(made(Memory), error, capture="run")
    with pytest.raises(
        ValueError, match=r"seen is of another size after the forward, for the 9th time, .*mode='eager'"
    ):
        for batch in data:
            step(*batch)
    model = made(Memory)
    wanted = torch_loop(model, data, error)
    own = made(Memory)
    step = compiled(own, error, mode="eager")
    got = [step(*batch) for batch in data]
    torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=2e-5, atol=2e-6)
    assert own.get_buffer("seen").shape == model.get_buffer("seen").shape == (11, 2)
