"""`schedule_free` against its recursion, written out by hand."""

from __future__ import annotations

import pytest
import torch

from fusion_compile import optim
from tests.optim.one_tensor import G1, G2, P, Walk, same, sgd


def test_schedule_free_steps_z_averages_x_and_places_y() -> None:
    walk = Walk(optim.schedule_free(sgd(), 0.1, 0.9))
    same(walk.y(), P)
    walk(G1)
    z1 = P - 0.1 * G1
    same(walk.p, z1)  # c = 1 at the first update
    same(walk.y(), z1)
    walk(G2)
    z2 = z1 - 0.1 * G2
    same(walk.p, (z1 + z2) / 2)
    same(walk.y(), 0.9 * walk.p + 0.1 * z2)
    same(walk.y(schedule_free_beta=0.5), 0.5 * walk.p + 0.5 * z2)
    same(walk.state.z["w"], z2)


def test_a_warm_up_weighs_the_average_by_the_square_of_the_largest_lr_so_far() -> None:
    walk = Walk(optim.schedule_free(sgd(), 0.1))
    z, weights, zs = P, [], []
    for g, lr, largest in ((G1, 0.1, 0.1), (G2, 0.3, 0.3), (G1, 0.2, 0.3)):
        walk(g, lr=lr)
        z = z - lr * g
        zs.append(z)
        weights.append(largest**2)
        same(walk.p, sum((w * z for w, z in zip(weights, zs, strict=True)), torch.zeros(())) / sum(weights))


def test_a_start_at_lr_zero_moves_nothing_and_is_forgotten() -> None:
    walk = Walk(optim.schedule_free(sgd(decay=0.1), 0.1))
    for _ in range(2):
        assert not walk(G1, lr=0.0).any()
        assert torch.equal(walk.y(), P)
    walk(G2, lr=0.1)
    same(walk.p, P - 0.1 * (G2 + 0.1 * P))  # as if it were the first update


def test_decay_acts_at_z_inside_the_base_and_at_y_by_name() -> None:
    at_z = Walk(optim.schedule_free(sgd(decay=0.5), 0.1))
    at_y = Walk(optim.schedule_free(sgd(), 0.1, decay_at_y=0.5))
    for walk in (at_z, at_y):
        walk(G1)
        walk(G2)
        z, y = walk.state.z["w"], walk.y()
        walk(G1)
        same(walk.state.z["w"], z - 0.1 * (G1 + 0.5 * (z if walk is at_z else y)))
        assert float((z - y).abs().max()) > 0.01  # else the two were one


def test_schedule_free_refuses_to_wrap_itself() -> None:
    inner = optim.schedule_free(sgd(), 0.1)
    with pytest.raises(ValueError, match=r"schedule_free\(sgd\) already moves the gradient point"):
        optim.schedule_free(inner, 0.1)
    with pytest.raises(ValueError, match=r"partition already moves the gradient point"):
        optim.schedule_free(optim.partition({"scalar": inner}), 0.1)
