"""The point some momenta ahead: bounded by entry, blind to what is no number, and live in k."""

import torch

from fusion_compile import optim
from fusion_compile.optim._look_ahead import look_ahead
from fusion_compile.optim._transform import Named
from tests.optim.walks import numbers


def test_the_point() -> None:
    base = optim.chain(optim.average_steps(0.1, 0.5), optim.descend())
    ahead = look_ahead(base, lambda state: state[0].mu, Named("look_ahead", 2.0), Named("lr", 0.1), 1.0)
    params = {"w": torch.zeros(4, dtype=torch.float64)}
    state = ahead.init(params)
    mu = torch.tensor([0.05, -0.05, 9.0, float("nan")], dtype=torch.float64)
    state = (state[0]._replace(mu={"w": mu}), state[1])
    assert ahead.gradient_point is not None
    point = ahead.gradient_point(params, state, numbers(ahead))["w"]
    torch.testing.assert_close(point, torch.tensor([-0.1, 0.1, -0.2, 0.0], dtype=torch.float64))
    nearer = ahead.gradient_point(params, state, numbers(ahead, look_ahead=1.0))["w"]
    torch.testing.assert_close(nearer, torch.tensor([-0.05, 0.05, -0.1, 0.0], dtype=torch.float64))
    again = ahead.bind({}) if ahead.bind is not None else None
    assert again is not None and again.gradient_point is not None and again.descends
