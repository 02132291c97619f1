"""Coins of probability 0 or 1: what they decide is captured, what they draw is drawn, and any other coin is refused."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.by_running.settled_coins import SettledCoins
from fusion_compile._compat import DATA_DEPENDENT, fake_mode
from tests.small_models import assert_same_weights, batches, compiled, torch_loop

Coin = Callable[[bool], bool]


class Dropping(nn.Module):
    """A block that a coin may leave out."""

    def __init__(self, runs: Coin) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.block, self.last, self.runs = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2), runs

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if self.runs(self.training):
            h = h + self.block(h)
        out: Tensor = self.last(h)
        return out


def as_in_peft(training: bool) -> bool:
    return (not training) or bool(training and torch.rand(1) > 0.0)


def as_in_transformers(training: bool) -> bool:
    drawn = torch.rand([])
    return not (training and drawn < 0.0)


def stochastic_depth(training: bool) -> bool:
    return not training or (torch.rand((1,))[0].to("cpu") < 1.0).item() is True


@pytest.mark.parametrize("options", [{}, {"capture": "run"}], ids=["any way", "run"])
@pytest.mark.parametrize("coin", [as_in_peft, as_in_transformers, stochastic_depth])
def test_a_coin_that_decides_nothing_is_drawn_and_captured(coin: Coin, options: dict[str, Any]) -> None:
    mine, reference = Dropping(coin), Dropping(coin)
    torch.manual_seed(7)
    expected = torch_loop(reference, batches(3), lr=1e-2)
    after = torch.rand(2)
    step = compiled(mine, lr=1e-2, **options)
    torch.manual_seed(7)
    with pytest.warns(UserWarning, match="captured by running") if not options else contextlib.nullcontext():
        losses = [step(*batch) for batch in batches(3)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference)
    assert torch.equal(torch.rand(2), after) and len(step.programs) == 1


def test_a_coin_that_decides_is_refused_by_its_line() -> None:
    step = compiled(Dropping(lambda training: bool(torch.rand(1) > 0.1)))
    with pytest.raises(ValueError, match=r"torch\.rand\(1\) > 0\.1.*\nreads a tensor's value on the host"):
        step(*batches(1)[0])


@pytest.mark.parametrize(
    ("name", "coin", "outcome"),
    [
        ("below 0", lambda u: u < 0, False),
        ("0 and less", lambda u: u <= 0.0, False),
        ("above 0", lambda u: u > 0, True),
        ("0 and more", lambda u: u >= 0, True),
        ("turned round", lambda u: operator.gt(1, u), True),
        ("above 1", lambda u: torch.gt(u, 1), False),
        ("below 2", lambda u: u.lt(2.0), True),
        ("half", lambda u: u < 0.5, None),
        ("written before", lambda u: u.mul_(3) < 1.0, None),
        ("written after", lambda u: (u < 1.0).logical_not_(), None),
        ("computed", lambda u: u + 1 < 1.0, None),
        ("a tensor", lambda u: u < torch.ones(()), None),
        ("normal", lambda u: torch.randn(()) < 1.0, None),
    ],
)
def test_outcomes(name: str, coin: Callable[[Tensor], Any], outcome: bool | None) -> None:
    with fake_mode(), SettledCoins():
        thrown = coin(torch.rand(()))
        if outcome is None:
            with pytest.raises(DATA_DEPENDENT):
                bool(thrown)
        else:
            assert bool(thrown) is outcome, name


def test_many_coins_at_once_are_no_one_coin() -> None:
    with fake_mode(), SettledCoins(), pytest.raises(Exception, match=r"ambiguous|data-dependent|_local_scalar"):
        bool(torch.rand(2) < 0)
