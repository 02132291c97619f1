"""Rounding to bf16 at random: which two numbers, with which probability."""

import torch

from fusion_compile.optim.codecs.stochastic import stochastic_bf16
from tests.oracles.codecs import bf16_neighbours

EVERY_NOISE = torch.arange(65536)


def test_each_number_goes_to_its_neighbours_with_the_exact_probability() -> None:
    """Over all 65,536 noises the mean is the number itself, to the rounding of this sum."""
    for value in (1.0, -1.003, 3.14159, -2.5e-30, 1e-40, 65504.1, -7.7e37):
        x = torch.full((65536,), value)
        found = stochastic_bf16(x, EVERY_NOISE).double()
        low, high = bf16_neighbours(x[:1].double().numpy())
        if abs(value) > 1e-37:  # below, bf16's step no longer follows the exponent
            assert set(found.tolist()) <= {float(low[0]), float(high[0])}
        assert float(found.mean()) == float(x[0].double())


def test_signs_are_alike_and_what_bf16_holds_stays() -> None:
    x = torch.randn(65536)
    assert torch.equal(stochastic_bf16(-x, EVERY_NOISE), -stochastic_bf16(x, EVERY_NOISE))
    held = x.to(torch.bfloat16)
    assert torch.equal(stochastic_bf16(held.float(), EVERY_NOISE), held)


def test_infinity_and_nan_stay() -> None:
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    found = stochastic_bf16(odd, torch.full((3,), 65535))
    assert found[:2].tolist() == [float("inf"), -float("inf")] and bool(found[2].isnan())
    quiet = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # nan whose bits are all ones
    assert bool(stochastic_bf16(quiet, torch.tensor([65535])).isnan().all())
