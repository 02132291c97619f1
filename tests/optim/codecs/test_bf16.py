"""The codec bf16: unbiased where noise is given, to nearest without."""

import torch

from fusion_compile.optim.codecs.bf16 import BF16


def test_to_nearest_without_noise() -> None:
    x = torch.randn(1000)
    assert torch.equal(BF16.decode(BF16.encode(x, None), x), x.to(torch.bfloat16).float())
    assert BF16.encode(x, None)[""].nbytes == 2 * x.numel()


def test_a_slow_average_does_not_stall() -> None:
    """β = 0.999 from 1 towards 0: after 1,000 steps 0.368 is left. To nearest nothing ever moves."""
    torch.manual_seed(0)
    drawn, nearest = torch.ones(4096), torch.ones(4096)
    for _ in range(1000):
        drawn = BF16.decode(BF16.encode(0.999 * drawn, torch.randint(0, 65536, (4096,))), drawn)
        nearest = BF16.decode(BF16.encode(0.999 * nearest, None), nearest)
    # One draw has a variance of at most u²/4 with u = 2⁻⁸; a thousand of them, over 4,096 entries: 1e-3 of the mean.
    assert abs(float(drawn.mean()) - 0.999**1000) < 4e-3
    assert float(nearest.min()) == 1.0
