"""One 2x3 tensor under one transform, in float64, for formulas written out by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile.optim import Context, Transform

P = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)


G1 = torch.tensor([[0.3, -0.1, 2.0], [-4.0, 0.05, 1.0]], dtype=torch.float64)


G2 = torch.tensor([[-0.6, 0.2, 1.0], [2.0, 0.1, -3.0]], dtype=torch.float64)


def same(found: Tensor, wanted: Tensor) -> None:
    """To float64 rounding."""
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def context(transform: Transform, **changed: float) -> Context:
    values = {n: changed.get(n, v(0) if callable(v) else v) for n, v in transform.hyperparameters.items()}
    return Context({n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()})


class Walk:
    """One tensor under one transform: `walk(g, lr=…)` gives the update, and adds it to `p`."""

    def __init__(self, transform: Transform, p: Tensor = P) -> None:
        self.transform, self.p = transform, p
        self.state = transform.init({"w": p})

    def __call__(self, g: Tensor, **changed: float) -> Tensor:
        updates, self.state = self.transform.update(
            {"w": g}, self.state, {"w": self.p}, context(self.transform, **changed)
        )
        self.p = self.p + updates["w"]
        return updates["w"]

    def y(self, **changed: float) -> Tensor:
        assert self.transform.gradient_point is not None
        return self.transform.gradient_point({"w": self.p}, self.state, context(self.transform, **changed))["w"]


def sgd(lr: float = 0.1, decay: float | None = None) -> Transform:
    parts = (
        [optim.scale_by_learning_rate(lr)]
        if decay is None
        else [optim.add_decayed_weights(decay), optim.scale_by_learning_rate(lr)]
    )
    return optim.chain(*parts, name="sgd")
