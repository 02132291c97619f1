"""The codec int8 against its twin, its bound and its bytes."""

import numpy as np
import pytest
import torch

from fusion_compile.optim.codecs.int8 import INT8
from tests.oracles import codecs as twin


@pytest.mark.parametrize("shape", [(1300,), (3, 7, 40)], ids=str)
def test_it_is_its_twin_within_half_a_step(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64) ** 3
    back = INT8.decode(INT8.encode(x, None), x)
    np.testing.assert_allclose(back.numpy(), twin.int8(x.numpy()), rtol=1e-14)
    for row, kept in zip(twin.rows(x.numpy(), 512), twin.rows(back.numpy(), 512), strict=True):
        assert np.abs(row - kept).max() <= np.abs(row).max() / 254 * (1 + 1e-12)


def test_bytes_and_codes() -> None:
    x = torch.randn(2, 3, 100)
    parts = INT8.encode(x, None)
    assert {n: (t.dtype, t.numel()) for n, t in parts.items()} == {
        "": (torch.int8, 600),
        "scale": (torch.float32, 6),
    }
    assert int(parts[""].min()) >= -127 and int(parts[""].abs().max()) == 127
    assert INT8.encode(torch.randn(2048), None)["scale"].shape == (4,)


def test_the_increments_that_the_docstring_says_are_lost() -> None:
    m = torch.tensor([[127.0, 6.0, 5.0, 4.0]])
    for _ in range(50):
        m = torch.cat([torch.full((1, 1), 127.0), 0.9 * m[:, 1:]], 1)  # decays, beside an entry that stays
        m = INT8.decode(INT8.encode(m, None), m)
    assert m.tolist() == [[127.0, 4.0, 4.0, 4.0]]
