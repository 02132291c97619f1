"""The correction of an average that started at zero."""

import torch

from fusion_compile import optim
from tests.optim.walks import Walk


def test_an_average_and_its_correction_are_the_mean() -> None:
    whole = optim.chain(optim.scale_by_momentum(optim.Named("beta1", 0.9)), optim.correct_bias(0.9))
    walk = Walk(whole, {"w": torch.zeros(2, dtype=torch.float64)})
    g = torch.tensor([1.0, -2.0], dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(walk({"w": g})["w"], g)
    walk({"w": g}, beta1=0.5)
    torch.testing.assert_close(walk({"w": g})["w"], g)  # the product of the betas that were used
