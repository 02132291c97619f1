"""`scale_by_learning_rate`: minus the rate, live; the part that takes the step."""

from __future__ import annotations

from fusion_compile import optim
from tests.optim.one_tensor import G1, Walk, same


def test_updates_are_multiplied_by_minus_the_rate_of_the_moment() -> None:
    walk = Walk(optim.scale_by_learning_rate(0.25))
    same(walk(G1), -0.25 * G1)
    same(walk(G1, lr=0.5), -0.5 * G1)


def test_it_takes_a_step_and_keeps_nothing() -> None:
    transform = optim.scale_by_learning_rate(optim.Named("scalar_lr", 0.1))
    assert transform.descends and dict(transform.hyperparameters) == {"scalar_lr": 0.1}
    assert transform.init({"w": G1}) == optim.EmptyState()
