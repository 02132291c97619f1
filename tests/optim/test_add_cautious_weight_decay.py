"""`add_cautious_weight_decay` against its twin."""

from __future__ import annotations

import torch

from fusion_compile.optim import chain, scale_by_learning_rate
from fusion_compile.optim.add_cautious_weight_decay import add_cautious_weight_decay
from tests.data.bowl import SHAPES
from tests.optim.cautious_walk import descent, over_mona
from tests.optim.walks import (
    Walk,
    distance,
)


def test_cautious_decay_follows_its_twin() -> None:
    assert distance(descent("mean", 0.5), over_mona("mean", 0.5), torch.float64, tuple(SHAPES)) <= 1e-9
    assert distance(descent("mean", 0.5), over_mona("mean", 0.499), torch.float64, tuple(SHAPES)) > 1e-5
    # As below; a sign against the weight's that rounds the other way changes an entry by lr · decay · |w| only.
    assert distance(descent("mean", 0.5), over_mona("mean", 0.5), torch.float32, tuple(SHAPES)) <= 6e-5


def test_decay_acts_where_it_agrees_and_where_nothing_moves() -> None:
    u, w = torch.tensor([1.0, -1.0, 0.0, 1.0]), torch.tensor([2.0, 2.0, 2.0, 0.0])
    walk = Walk(chain(add_cautious_weight_decay(0.5), scale_by_learning_rate(0.1)), {"w": w})
    torch.testing.assert_close(walk({"w": u})["w"], -0.1 * torch.tensor([2.0, -1.0, 1.0, 1.0]))
    assert not Walk(add_cautious_weight_decay(0.5), {"w": w})({"w": 0 * u}, weight_decay=0.0)["w"].any()
