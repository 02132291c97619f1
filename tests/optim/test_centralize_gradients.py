"""Gradient centralization: rows lose their mean, vectors stay, and the gradient itself is not changed."""

import torch

from fusion_compile import optim
from tests.optim.walks import Walk, keeps_the_laws


def test_rows_lose_their_mean() -> None:
    g = {"w": torch.randn(2, 3, 4), "b": torch.randn(5)}
    kept = {k: t.clone() for k, t in g.items()}
    found = Walk(optim.centralize_gradients(), {k: torch.zeros_like(t) for k, t in g.items()})(g)
    torch.testing.assert_close(found["w"], g["w"] - g["w"].mean(-1, keepdim=True))
    assert torch.equal(found["b"], g["b"]) and all(torch.equal(kept[k], g[k]) for k in g)
    keeps_the_laws(
        optim.chain(optim.centralize_gradients(), optim.scale_by_learning_rate(0.1)),
        {"matrix/a": torch.randn(3, 8, 5), "scalar/b": torch.randn(7)},
    )
