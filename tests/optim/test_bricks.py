"""Each brick against its formula, written out by hand on 2x3 tensors in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion_compile import optim
from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Named, Transform
from tests.oracles.newton_schulz import JORDAN, POLAR_EXPRESS, YOU, newton_schulz

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


# -- directions -------------------------------------------------------------------------------------------------------


def test_adam_divides_the_corrected_mean_by_the_root_of_the_corrected_square() -> None:
    walk = Walk(optim.scale_by_adam(0.9, 0.99, 1e-3))
    same(walk(G1), G1 / (G1.abs() + 1e-3))  # both corrections cancel the first averages exactly
    m, v = 0.09 * G1 + 0.1 * G2, 0.0099 * G1**2 + 0.01 * G2**2
    same(walk(G2), m / (1 - 0.81) / ((v / (1 - 0.9801)).sqrt() + 1e-3))


def test_adam_corrects_by_the_betas_really_used() -> None:
    walk = Walk(optim.scale_by_adam(0.9, 0.99, 0.0))
    walk(G1, beta1=0.5, beta2=0.8)
    m, v = 0.9 * 0.5 * G1 + 0.1 * G2, 0.99 * 0.2 * G1**2 + 0.01 * G2**2
    same(walk(G2), m / (1 - 0.9 * 0.5) / (v / (1 - 0.99 * 0.8)).sqrt())


def test_rms_has_no_first_moment() -> None:
    walk = Walk(optim.scale_by_rms(0.99, 1e-3))
    same(walk(G1), G1 / (G1.abs() + 1e-3))
    v = 0.0099 * G1**2 + 0.01 * G2**2
    same(walk(G2), G2 / ((v / (1 - 0.9801)).sqrt() + 1e-3))


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("table", "twin"), [("jordan", JORDAN), ("quintic", YOU), ("polar_express", POLAR_EXPRESS)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_orthogonalize_averages_looks_ahead_and_iterates(table: str, twin: Any, nesterov: bool, tall: bool) -> None:
    g1, g2, p = (t.T.contiguous() if tall else t for t in (G1, G2, P))
    walk = Walk(optim.orthogonalize(0.8, nesterov=nesterov, table=table, hot_dtype=torch.float64), p)
    mu = 0.2 * g1
    first = walk(g1)
    mu = 0.8 * mu + 0.2 * g2
    ahead = 0.2 * g2 + 0.8 * mu if nesterov else mu
    same(walk(g2), torch.from_numpy(newton_schulz(ahead.numpy(), twin)))
    # The first direction is g1's whatever the momentum: Newton-Schulz is blind to scale, but for the 1e-6 or less in
    # the norm
    torch.testing.assert_close(first, torch.from_numpy(newton_schulz(g1.numpy(), twin)), rtol=0, atol=1e-4)


def test_orthogonalize_gives_singular_values_near_one_in_every_hot_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = Walk(optim.orthogonalize(0.0, table="quintic", hot_dtype=dtype))(G1)
        assert out.dtype == torch.float64
        values = torch.linalg.svdvals(out)
        # The quintic's band is [0.978, 1.032]; bf16 rounds each of about ten products by up to 4e-3
        assert float(values.min()) > 0.95 and float(values.max()) < 1.06, (dtype, values)


def rows_normalized(o: Tensor, nu: Tensor) -> Tensor:
    return o / nu.sqrt()[:, None]


def test_normalize_neurons_preserves_the_norm() -> None:
    walk = Walk(optim.normalize_neurons(0.9))
    nu = 0.1 * (G1**2).mean(1)
    p1 = rows_normalized(G1, nu)
    torch.testing.assert_close(
        walk(G1), p1 * G1.norm() / p1.norm(), rtol=1e-8, atol=0
    )  # eps 1e-10 beside values of 0.1
    nu = 0.9 * nu + 0.1 * (G2**2).mean(1)
    p2 = rows_normalized(G2, nu)
    torch.testing.assert_close(walk(G2), p2 * G2.norm() / p2.norm(), rtol=1e-8, atol=0)


def test_normalize_neurons_matches_an_rms_of_a_fifth() -> None:
    walk = Walk(optim.normalize_neurons(0.9, scale="match_rms"))
    p1 = rows_normalized(G1, 0.1 * (G1**2).mean(1))
    out = walk(G1)
    torch.testing.assert_close(out, 0.2 * p1 * math.sqrt(6) / p1.norm(), rtol=1e-8, atol=0)  # eps 1e-10
    assert float(out.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-8)


def test_shape_decay_and_rate() -> None:
    tall = torch.ones(8, 2, dtype=torch.float64)
    assert Walk(optim.scale_by_shape("original"), tall)(tall)[0, 0] == 2.0
    assert Walk(optim.scale_by_shape("original"), tall.T)(tall.T)[0, 0] == 1.0
    assert float(Walk(optim.scale_by_shape("match_rms_adamw"), tall.T)(tall.T)[0, 0]) == pytest.approx(0.2 * 8**0.5)
    assert torch.equal(Walk(optim.scale_by_shape("none"), tall)(tall), tall)
    same(Walk(optim.add_decayed_weights(0.5))(G1), G1 + 0.5 * P)
    same(Walk(optim.scale_by_learning_rate(0.25))(G1), -0.25 * G1)
    chained = optim.chain(optim.add_decayed_weights(0.5), optim.scale_by_learning_rate(0.25))
    same(Walk(chained)(G1), -0.25 * (G1 + 0.5 * P))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: optim.orthogonalize(table="keller"), "'keller' is not known.*'jordan', 'quintic', 'polar_express'"),
        (lambda: optim.orthogonalize(hot_dtype=torch.int8), r"hot_dtype=torch\.int8 cannot run Newton-Schulz"),
        (lambda: optim.normalize_neurons(scale="rms"), "'rms' is not known.*'preserve_norm', 'match_rms'"),
        (lambda: optim.scale_by_shape("muon"), "'muon' is not known.*'original'"),
        (lambda: optim.sf_adamw(decay_at="x"), "'x' is not known; use 'y' or 'z'"),
    ],
)
def test_an_option_that_is_not_known_lists_those_that_are(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


# -- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.5, 4.7, 100.0, math.inf])
def test_clip_is_torch_clip_grad_norm(bound: float) -> None:
    grads = {"a": G1, "b": G2[0]}
    leaves = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(leaves, bound)
    transform = optim.clip_by_global_norm(bound)
    clipped, _ = transform.update(grads, transform.init(grads), grads, context(transform))
    for leaf, found in zip(leaves, clipped.values(), strict=True):
        same(found, leaf.grad)
    assert torch.equal(clipped["a"], G1) == (bound >= 100)


# -- Schedule-Free ----------------------------------------------------------------------------------------------------


def sgd(lr: float = 0.1, decay: float | None = None) -> Transform:
    parts = (
        [optim.scale_by_learning_rate(lr)]
        if decay is None
        else [optim.add_decayed_weights(decay), optim.scale_by_learning_rate(lr)]
    )
    return optim.chain(*parts, name="sgd")


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
        same(walk.p, sum(w * z for w, z in zip(weights, zs, strict=True)) / sum(weights))


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


# -- joining ----------------------------------------------------------------------------------------------------------


def test_chain_refuses_nothing_at_all_and_two_gradient_points() -> None:
    with pytest.raises(ValueError, match="at least one transform"):
        optim.chain()
    with pytest.raises(ValueError, match=r"schedule_free\(a\), schedule_free\(b\) both move the point"):
        optim.chain(*(optim.schedule_free(optim.chain(sgd(), name=name), 0.1) for name in "ab"))


def test_a_chain_passes_on_the_gradient_point_of_its_one_mover() -> None:
    chained = optim.chain(optim.clip_by_global_norm(1e9), optim.schedule_free(sgd(), 0.1))
    plain, clipped = Walk(optim.schedule_free(sgd(), 0.1)), Walk(chained)
    for g in (G1, G2):
        plain(g)
        clipped(g)
    same(clipped.y(), plain.y())
    assert float((clipped.y() - clipped.p).abs().max()) > 0.01


def test_one_name_is_one_number() -> None:
    with pytest.raises(ValueError, match=r"'lr' is declared twice with different values \(0\.1 and 0\.2\).*scalar_lr"):
        optim.partition({"spectral": sgd(0.1), "scalar": sgd(0.2)})
    with pytest.raises(ValueError, match="'weight_decay' is declared twice"):
        optim.chain(optim.add_decayed_weights(0.1), optim.add_decayed_weights(0.3))
    shared = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(0.1)})
    assert shared.hyperparameters == {"lr": 0.1}
    apart = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(Named("scalar_lr", 0.2))})
    assert apart.hyperparameters == {"lr": 0.1, "scalar_lr": 0.2}


def test_partition_sends_each_bank_to_its_role_and_keeps_the_order() -> None:
    halves = optim.partition({"spectral": sgd(0.1), "scalar": optim.scale_by_learning_rate(Named("scalar_lr", 0.2))})
    banks = {"scalar/a": P, "spectral/b": P, "scalar/c": G1}
    updates, _ = halves.update(banks, halves.init(banks), banks, context(halves))
    assert list(updates) == list(banks) and halves.roles == ("spectral", "scalar")
    wanted: Tensors = {"scalar/a": -0.2 * P, "spectral/b": -0.1 * P, "scalar/c": -0.2 * G1}
    for key, u in wanted.items():
        same(updates[key], u)


def test_partition_leaves_the_gradient_point_of_a_part_without_one_where_it_is() -> None:
    mixed = optim.partition({"spectral": optim.schedule_free(sgd(), 0.1), "scalar": sgd()})
    params: Tensors = {"scalar/a": P, "spectral/b": P}
    state = mixed.init(params)
    for g in (G1, G2):
        updates, state = mixed.update(dict.fromkeys(params, g), state, params, context(mixed))
        params = {key: p + updates[key] for key, p in params.items()}
    assert mixed.gradient_point is not None
    point = mixed.gradient_point(params, state, context(mixed))
    assert list(point) == list(params)
    assert torch.equal(point["scalar/a"], params["scalar/a"])
    assert not torch.equal(point["spectral/b"], params["spectral/b"])


def test_a_bank_of_an_unknown_role_is_refused() -> None:
    with pytest.raises(
        ValueError, match="bank 'expert/4x4' has no transform; partition\\(\\) was given spectral, scalar"
    ):
        optim.partition({"spectral": sgd(), "scalar": sgd()}).init({"expert/4x4": P})


# -- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (optim.constant(2.0), {0: 2.0, 10**6: 2.0}),
        (optim.constant(2.0, warmup_steps=4), {0: 0.5, 1: 1.0, 3: 2.0, 4: 2.0}),
        (optim.linear(2.0, 12, 4, final=1.0), {0: 0.5, 3: 2.0, 4: 2.0, 8: 1.5, 12: 1.0, 99: 1.0}),
        (optim.linear(2.0, 4), {0: 2.0, 1: 1.5, 4: 0.0}),
        (optim.cosine(2.0, 12, 4, final=1.0), {0: 0.5, 3: 2.0, 4: 2.0, 8: 1.5, 12: 1.0, 99: 1.0}),
        (optim.cosine(2.0, 12), {0: 2.0, 4: 1.5, 8: 0.5, 12: 0.0}),
    ],
)
def test_schedule_values_at_warm_up_middle_and_end(schedule: optim.Schedule, values: dict[int, float]) -> None:
    found = np.array([schedule(step) for step in values])
    np.testing.assert_allclose(found, list(values.values()), rtol=0, atol=1e-12)  # cos in float64
    assert isinstance(schedule, optim.Schedule)


@pytest.mark.parametrize("kind", [optim.cosine, optim.linear])
def test_a_schedule_without_room_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="warmup_steps=-1 is negative"):
        kind(1.0, 10, -1)
    with pytest.raises(ValueError, match="total_steps=10 must be larger than warmup_steps=10"):
        kind(1.0, 10, 10)
    with pytest.raises(ValueError, match="warmup_steps=-1 is negative"):
        optim.constant(1.0, -1)
