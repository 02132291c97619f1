"""The codec int8_companded against its twin's neighbours, its mean, and what a second moment needs of it."""

import numpy as np
import torch

from fusion_compile.optim.codecs.int8_companded import INT8_COMPANDED
from tests.oracles.codecs import companded_levels


def test_every_entry_goes_to_one_of_two_neighbours_and_the_mean_is_the_entry() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, dtype=torch.float64) ** 3
    low, high = companded_levels(x.numpy())
    noise = (torch.arange(4096)[:, None] * 16 + torch.randint(0, 16, (1, 200))).view(4096, 1, 200)
    many = x.expand(4096, 1, 200)
    found = INT8_COMPANDED.decode(INT8_COMPANDED.encode(many, noise), many)[:, 0].numpy()
    near = np.minimum(np.abs(found - low), np.abs(found - high)) / np.abs(x.numpy()).max()
    assert near.max() < 1e-12
    # 4,096 equally spaced noises: the share that rounds up is exact to 1/4096.
    assert (np.abs(found.mean(0) - x.numpy()) <= np.abs(high - low) / 4096 * 1.01).all()


def test_nothing_becomes_zero_and_small_second_moments_are_told_apart() -> None:
    v = torch.tensor([[1.0, 1e-4, 1e-6, 1e-8, 1e-12, 0.0]])
    back = INT8_COMPANDED.decode(INT8_COMPANDED.encode(v, torch.zeros_like(v, dtype=torch.int64)), v)
    assert bool((back[v > 0] > 0).all()) and float(back[0, -1]) == 0
    # One level up is 4/13 above 1e-4, whose code is 12, and a factor of (5/4)⁴ above 1e-6, whose code is 4.
    assert bool((back[0, 1] / v[0, 1] < (13 / 12) ** 4) and (back[0, 2] / v[0, 2] < (5 / 4) ** 4 * 1.1))
    assert float(back[0, 4]) == np.float32((1 / 127) ** 4)


def test_a_slow_second_moment_does_not_stall() -> None:
    """β₂ = 0.999 from 1 towards 0.01 beside an entry that stays: the mean follows, entry by entry it is drawn."""
    torch.manual_seed(1)
    v = torch.ones(1, 4096)
    for _ in range(1000):
        v = 0.999 * v + 0.001 * torch.cat([torch.ones(1, 1), torch.full((1, 4095), 0.01)], 1)
        v = INT8_COMPANDED.decode(INT8_COMPANDED.encode(v, torch.randint(0, 65536, v.shape)), v)
    expected = 0.01 + 0.99 * 0.999**1000
    assert abs(float(v[0, 1:].mean()) - expected) < 0.02 * expected
