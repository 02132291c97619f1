"""The codec that keeps what comes."""

import torch

from fusion_compile.optim.codecs.fp32 import FP32


def test_every_bit_stays() -> None:
    x = torch.randn(100)
    assert FP32.decode(FP32.encode(x, None), x) is x
