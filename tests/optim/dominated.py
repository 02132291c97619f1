"""Random matrices in which a few directions dominate."""

from __future__ import annotations

import torch
from torch import Tensor


def dominated(m: int, n: int, count: int, times: float, signs: bool, k: int = 4, seed: int = 0) -> Tensor:
    """`k` random matrices of norm 1, plus `count` directions that together have `times` that norm.

    `signs`: directions of ±1, in which all entries of a Gram matrix round alike.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(k, m, n, generator=generator)
    noise = noise / torch.linalg.matrix_norm(noise, keepdim=True)
    u, v = torch.randn(k, m, count, generator=generator), torch.randn(k, n, count, generator=generator)
    if signs:
        u, v = u.sign() / m**0.5, v.sign() / n**0.5
    else:
        u, v = torch.linalg.qr(u)[0], torch.linalg.qr(v)[0]
    return noise + times / count**0.5 * u @ v.mT
