"""Momentum behind the rate: a change of lr comes with a lag, decay at once, and β₁ = 0 keeps nothing."""

import torch

from fusion_compile import optim
from fusion_compile.optim.average_steps import keeps_average
from tests.optim.walks import Walk, keeps_the_laws


def test_by_hand_with_a_live_rate() -> None:
    p = torch.full((3,), 2.0, dtype=torch.float64)
    walk = Walk(optim.chain(optim.average_steps(0.1, 0.9, 0.5), optim.descend()), {"w": p})
    g = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    m = 0.1 * (0.1 * g)
    torch.testing.assert_close(walk({"w": g})["w"], -(m + 0.1 * 0.5 * p), rtol=1e-12, atol=0)
    p = walk.params["w"]
    m = m + 0.1 * (0.0 * g - m)
    torch.testing.assert_close(walk({"w": g}, lr=0.0)["w"], -m, rtol=1e-12, atol=0)  # the average still moves


def test_no_average_and_a_factor() -> None:
    whole = optim.chain(optim.average_steps(0.1, 0, 0.0, factor=0.2), optim.descend())
    walk = Walk(whole, {"w": torch.zeros(3)})
    assert walk.state[0].mu == {} and "beta1" not in whole.hyperparameters
    torch.testing.assert_close(walk({"w": torch.ones(3)})["w"], -0.02 * torch.ones(3))
    assert keeps_average(0.5) and keeps_average(optim.Named("b", 0.0)) and not keeps_average(0.0)
    keeps_the_laws(optim.chain(optim.average_steps(), optim.descend()), {"scalar/b": torch.randn(7)})
