"""The codec 4bit against its twin, its bound, its bytes and its packing."""

import numpy as np
import pytest
import torch

from fusion_compile.optim.codecs.four_bits import FOUR_BITS
from tests.oracles import codecs as twin


@pytest.mark.parametrize("shape", [(384,), (3, 7, 40), (2, 5, 33)], ids=str)
def test_it_is_its_twin_within_half_a_step(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) ** 3
    back = FOUR_BITS.decode(FOUR_BITS.encode(x, None), x)
    np.testing.assert_allclose(back.numpy(), twin.four_bits(x.numpy()), rtol=1e-14)
    one_each = [x] if x.ndim == 1 else list(x)
    kept = [back] if x.ndim == 1 else list(back)
    for m, k in zip(one_each, kept, strict=True):
        for row, near in zip(twin.rows(m.flatten().numpy(), 128), twin.rows(k.flatten().numpy(), 128), strict=True):
            assert np.abs(row - near).max() <= np.abs(row).max() / 14 * (1 + 1e-12)


def test_two_codes_a_byte_the_first_in_the_lower_half() -> None:
    parts = FOUR_BITS.encode(torch.tensor([7.0, -7.0, 0.0, 3.0]), None)
    assert parts[""].tolist() == [15 | 1 << 4, 8 | 11 << 4] and parts["scale"].tolist() == [1.0]
    assert sum(t.nbytes for t in FOUR_BITS.encode(torch.randn(4, 32, 64), None).values()) == 4 * 32 * 64 * 0.53125
