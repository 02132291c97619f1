"""`add_decayed_weights`: decay before the learning rate, and live."""

from __future__ import annotations

from fusion_compile import optim
from tests.optim.one_tensor import G1, P, Walk, same


def test_decay_is_added_to_the_direction_and_multiplied_by_the_rate() -> None:
    same(Walk(optim.add_decayed_weights(0.5))(G1), G1 + 0.5 * P)
    chained = optim.chain(optim.add_decayed_weights(0.5), optim.scale_by_learning_rate(0.25))
    same(Walk(chained)(G1), -0.25 * (G1 + 0.5 * P))


def test_the_decay_is_live_and_may_have_a_name_of_its_own() -> None:
    walk = Walk(optim.add_decayed_weights(optim.Named("head_decay", 0.5)))
    assert dict(walk.transform.hyperparameters) == {"head_decay": 0.5}
    same(walk(G1, head_decay=2.0), G1 + 2.0 * P)
