"""The slow twins, judged: by stored official trajectories (tests/data/), by the packages run live, by closed forms."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import schedulefree
import torch
from torch import Tensor

from tests.data.bowl import SCALAR, SHAPES, SPECTRAL, UPDATES, trace
from tests.data.official import CASES, Case
from tests.oracles.adamw import AdamW
from tests.oracles.clip import clip_by_global_norm, global_norm
from tests.oracles.muon import AdjustLr, Muon
from tests.oracles.newton_schulz import JORDAN, JORDAN_KELLER, POLAR_EXPRESS, YOU, Coefficients, newton_schulz
from tests.oracles.normuon import NorMuon
from tests.oracles.partition import Partition
from tests.oracles.protocol import Array, Oracle, Tensors, float64_copies
from tests.oracles.schedule_free import ScheduleFree
from tests.oracles.sf_adamw import SFAdamW
from tests.oracles.sf_normuon import SFNorMuon
from tests.problems import BowlGradient, run_oracle, run_torch

# Two float64 spellings of the same 60 updates: 1e-16 each, times the few hundred operations between start and end.
FLOAT64 = 1e-12
# The same through Newton-Schulz, whose slope at zero, about 3.4^5 = 500 for Jordan's triple, magnifies rounding.
FLOAT64_NS = 1e-10

AUX: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}  # the AdamW beside every matrix method
OFFICIAL: dict[str, Callable[[Tensors], Oracle]] = {
    "torch_muon_original_fp32ns": lambda p: Muon(p, spectral=SPECTRAL, lr=0.02, weight_decay=0.1, scalar=AUX),
    "muon_kellerjordan_fp32ns": lambda p: Muon(p, spectral=SPECTRAL, lr=0.02, coefficients=JORDAN_KELLER, scalar=AUX),
    "normuon_official_fp32ns": lambda p: NorMuon(p, spectral=SPECTRAL, lr=0.02, scalar=AUX),
    "po_normuon_match_rms_fp32ns": lambda p: NorMuon(
        p, spectral=SPECTRAL, lr=0.02, update_scale="match_rms", scalar=AUX
    ),
    "sf_adamw": lambda p: SFAdamW(p, lr=2.5e-3),
    "sf_wrapper_muon_nowd_fp32ns": lambda p: Partition(
        p,
        [
            (SPECTRAL, lambda q: ScheduleFree(q, lambda r: Muon(r, spectral=SPECTRAL, lr=0.02))),
            (SCALAR, lambda q: AdamW(q, **AUX)),
        ],
    ),
}


def test_every_stored_case_has_a_twin() -> None:
    assert set(OFFICIAL) == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_twin_follows_the_official_trajectory(name: str) -> None:
    case, start = Case(name), BowlGradient().start
    oracle = OFFICIAL[name](start)
    done = 0
    ratios: dict[tuple[int, str, str], float] = {}
    for update in UPDATES:
        run_oracle(oracle, range(done + 1, update + 1))
        done = update
        for kind in case.kinds:
            point = oracle.gradient_point() if kind == "y" else oracle.weights()
            ratios |= {(update, kind, n): r for n, r in case.ratios(update, kind, trace(point, start)).items()}
    too_far = {key: ratio for key, ratio in ratios.items() if not ratio <= 1}
    assert len(ratios) == len(UPDATES) * len(case.kinds) * len(SHAPES) and not too_far, too_far


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("torch_muon_original_fp32ns", lambda p: Muon(p, spectral=SPECTRAL, lr=0.02, weight_decay=0.0998, scalar=AUX)),
        ("normuon_official_fp32ns", lambda p: NorMuon(p, spectral=SPECTRAL, lr=0.02, beta2=0.951, scalar=AUX)),
        ("sf_adamw", lambda p: SFAdamW(p, lr=2.5e-3, betas=(0.9001, 0.999))),
    ],
)
def test_the_bound_notices_a_hyperparameter_that_is_slightly_off(name: str, wrong: Callable[[Tensors], Oracle]) -> None:
    case, start = Case(name), BowlGradient().start
    oracle = wrong(start)
    run_oracle(oracle, range(1, 21))
    assert max(case.ratios(20, "y", trace(oracle.gradient_point(), start)).values()) > 1


# -- the packages, run live in float64 --------------------------------------------------------------------------------


def leaves(names: tuple[str, ...]) -> dict[str, Tensor]:
    start = BowlGradient().start
    return {name: torch.nn.Parameter(torch.from_numpy(start[name].copy())) for name in names}


def starts(names: tuple[str, ...]) -> Tensors:
    start = BowlGradient().start
    return {name: start[name] for name in names}


def farthest(found: Tensors, expected: dict[str, Tensor] | Tensors) -> float:
    """The largest ||found - expected|| / ||expected - start|| over the tensors."""
    want, start = float64_copies(expected), BowlGradient().start
    return max(float(np.linalg.norm(found[n] - w) / np.linalg.norm(w - start[n])) for n, w in want.items())


def warm_then_fall(update: int) -> float:
    """A factor on the lr: linear to 1 at update 10, then falling, so that lr_max differs from lr."""
    return update / 10 if update < 10 else 1.0 - (update - 10) / 100


@pytest.fixture
def exact_newton_schulz(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon's own code with its `.bfloat16()` meaning float64 (a copy: the code divides it in place)."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.double().clone())


def test_adamw_is_torch_adamw_while_the_lr_changes() -> None:
    params, oracle = leaves(tuple(SHAPES)), AdamW(BowlGradient().start, betas=(0.9, 0.95), weight_decay=0.1)
    official = torch.optim.AdamW(params.values(), betas=(0.9, 0.95), weight_decay=0.1)

    def set_lr(update: int) -> None:
        oracle.lr = official.param_groups[0]["lr"] = 2e-3 * warm_then_fall(update)

    run_torch(params, official.step, range(1, 61), set_lr)
    run_oracle(oracle, range(1, 61), set_lr)
    assert farthest(oracle.weights(), params) < FLOAT64


@pytest.mark.usefixtures("exact_newton_schulz")
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon_with_a_float64_newton_schulz(scale: AdjustLr, nesterov: bool) -> None:
    params = leaves(SPECTRAL)
    official = torch.optim.Muon(params.values(), lr=5e-3, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn=str(scale))
    run_torch(params, official.step, range(1, 21), lambda update: None)
    oracle = Muon(starts(SPECTRAL), spectral=SPECTRAL, lr=5e-3, weight_decay=0.1, nesterov=nesterov, scale=scale)
    run_oracle(oracle, range(1, 21))
    assert farthest(oracle.weights(), params) < FLOAT64_NS


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_moves_as_torch_muon_in_bf16(scale: AdjustLr) -> None:
    params = leaves(SPECTRAL)
    official = torch.optim.Muon(params.values(), lr=5e-3, weight_decay=0.1, adjust_lr_fn=str(scale))
    run_torch(params, official.step, range(1, 21), lambda update: None)
    oracle = Muon(starts(SPECTRAL), spectral=SPECTRAL, lr=5e-3, weight_decay=0.1, scale=scale)
    run_oracle(oracle, range(1, 21))
    start, found, want = BowlGradient().start, oracle.weights(), float64_copies(params)
    for name in SPECTRAL:
        a, b = (moved[name] - start[name] for moved in (found, want))
        cosine = float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))
        # bf16 keeps 8 bits: each entry of O is off by about 1e-2, so the direction by 1e-2^2 / 2 and the length by less
        assert cosine > 0.999 and abs(np.linalg.norm(a) / np.linalg.norm(b) - 1) < 5e-3, (name, cosine)


@pytest.mark.parametrize(("weight_decay", "warmup"), [(0.0, 0), (0.1, 0), (0.1, 7)])
def test_sf_adamw_is_schedulefree_adamw(weight_decay: float, warmup: int) -> None:
    params, names = leaves(tuple(SHAPES)), tuple(SHAPES)
    official = schedulefree.AdamWScheduleFree(params.values(), weight_decay=weight_decay, warmup_steps=warmup)
    oracle = SFAdamW(starts(names), weight_decay=weight_decay, warmup_steps=warmup)

    def set_lr(update: int) -> None:
        oracle.lr = official.param_groups[0]["lr"] = 2.5e-3 * (1.0 if warmup else warm_then_fall(update))

    official.train()
    run_torch(params, official.step, range(1, 61), set_lr)
    run_oracle(oracle, range(1, 61), set_lr)
    assert farthest(oracle.gradient_point(), params) < FLOAT64
    official.eval()
    assert farthest(oracle.weights(), params) < FLOAT64


@pytest.mark.usefixtures("exact_newton_schulz")
@pytest.mark.parametrize(("at_y", "at_z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1)])
def test_schedule_free_over_muon_is_the_wrapper_over_torch_muon(at_y: float, at_z: float) -> None:
    params = leaves(SPECTRAL)
    base = torch.optim.Muon(params.values(), lr=0.02, weight_decay=at_z)
    official = schedulefree.ScheduleFreeWrapper(base, weight_decay_at_y=at_y, momentum=0.9)
    oracle = ScheduleFree(
        starts(SPECTRAL), lambda p: Muon(p, spectral=SPECTRAL, weight_decay=at_z), weight_decay_at_y=at_y
    )

    def set_lr(update: int) -> None:
        oracle.lr = base.param_groups[0]["lr"] = 0.02 * warm_then_fall(update)

    official.train()
    run_torch(params, official.step, range(1, 26), set_lr)
    run_oracle(oracle, range(1, 26), set_lr)
    assert farthest(oracle.gradient_point(), params) < FLOAT64_NS
    official.eval()
    assert farthest(oracle.weights(), params) < FLOAT64_NS


def test_decay_at_z_is_the_wrapper_over_torch_adamw_without_first_moment() -> None:
    names = tuple(SHAPES)
    params = leaves(names)
    base = torch.optim.AdamW(params.values(), lr=0.0, betas=(0.0, 0.999), weight_decay=0.1)
    # The wrapper puts z into the base's state, after which Adam no longer sees an empty state to fill: an update at
    # lr 0 with zero gradients fills it first, and its count is taken back.
    for p in params.values():
        p.grad = torch.zeros_like(p)
    base.step()
    for p in params.values():
        base.state[p]["step"].zero_()
    base.param_groups[0]["lr"] = 2.5e-3
    official = schedulefree.ScheduleFreeWrapper(base, momentum=0.9)
    official.train()
    run_torch(params, official.step, range(1, 61), lambda update: None)
    oracle = SFAdamW(starts(names), weight_decay=0.1, decay_at="z")
    run_oracle(oracle, range(1, 61))
    assert farthest(oracle.gradient_point(), params) < FLOAT64


def test_clip_is_torch_clip_grad_norm() -> None:
    gradient = BowlGradient()
    grads = gradient(gradient.start, 1)
    params = leaves(tuple(SHAPES))
    for max_norm in (0.5 * global_norm(grads), 2.0 * global_norm(grads)):
        for name, g in grads.items():
            params[name].grad = torch.from_numpy(g.copy())
        norm = torch.nn.utils.clip_grad_norm_(params.values(), max_norm)
        assert float(norm) == pytest.approx(global_norm(grads), rel=1e-14)  # float64 sums in another order
        clipped = clip_by_global_norm(grads, max_norm)
        for name, p in params.items():
            assert p.grad is not None
            np.testing.assert_allclose(clipped[name], p.grad.numpy(), rtol=1e-14)  # the same factor, last digit


# -- no official code: closed forms and independent spellings ---------------------------------------------------------


@pytest.mark.parametrize(("weight_decay", "warmup"), [(0.0, 0), (0.05, 8)])
def test_sf_normuon_is_schedule_free_over_match_rms_normuon(weight_decay: float, warmup: int) -> None:
    twin = SFNorMuon(BowlGradient().start, spectral=SPECTRAL, weight_decay=weight_decay, warmup_steps=warmup)

    def normuon(p: Tensors) -> NorMuon:
        return NorMuon(
            p,
            spectral=SPECTRAL,
            momentum=0.8,
            nesterov=False,
            eps=1e-8,
            weight_decay=weight_decay,
            update_scale="match_rms",
            coefficients=JORDAN,
            scalar={"betas": (0.0, 0.999), "weight_decay": weight_decay},
        )

    composed = ScheduleFree(BowlGradient().start, normuon)

    def set_lr(update: int) -> None:
        assert isinstance(composed.base, NorMuon)
        composed.lr = composed.base.scalar.lr = 0.008 * (min(1.0, update / warmup) if warmup else 1.0)

    run_oracle(twin, range(1, 21))
    run_oracle(composed, range(1, 21), set_lr)
    # NorMuon's code adds 1e-10 to ||Phat||, about 200 here; the paper does not: 5e-13 of each update
    assert farthest(twin.weights(), composed.weights()) < 1e-11
    assert farthest(twin.gradient_point(), composed.gradient_point()) < 1e-11


def test_sf_normuon_moves_z_by_exactly_a_fifth_of_the_lr_in_rms() -> None:
    gradient = BowlGradient()
    oracle = SFNorMuon(gradient.start, spectral=SPECTRAL, weight_decay=0.0)
    for update in range(1, 6):
        before = copy.deepcopy(oracle.z)
        run_oracle(oracle, [update])
        for name in SPECTRAL:
            rms = math.sqrt(float(np.mean((oracle.z[name] - before[name]) ** 2)))
            assert rms == pytest.approx(0.2 * 0.008, rel=1e-12)  # float64 rounding of p and of the norm


def test_weights_of_equal_lr_make_x_the_plain_mean_of_z() -> None:
    oracle = SFNorMuon(BowlGradient().start, spectral=SPECTRAL)
    seen = []
    for update in range(1, 7):
        run_oracle(oracle, [update])
        seen.append(copy.deepcopy(oracle.z | oracle.scalar.z))
    mean = {name: np.asarray(np.mean([z[name] for z in seen], axis=0)) for name in SHAPES}
    assert farthest(oracle.weights(), mean) < FLOAT64


def test_the_weight_of_the_average_falls_with_the_lr_only_when_asked() -> None:
    start = {"w": np.array([0.0])}
    by_max, by_lr = SFAdamW(start), SFAdamW(start, weight_by="lr")
    for oracle in (by_max, by_lr):
        for lr in (0.2, 0.1):
            oracle.lr = lr
            oracle.step({"w": np.array([1.0])})  # u is 1 at every update: z = -0.2, then -0.3
    # weights .04, .04 and .04, .01; eps 1e-8 in u is the only other difference
    assert by_max.x["w"][0] == pytest.approx(-0.25, rel=1e-7)
    assert by_lr.x["w"][0] == pytest.approx(-0.2 - 0.1 * 0.2, rel=1e-7)


@pytest.mark.parametrize(
    ("coefficients", "lowest", "low", "high"),
    [(JORDAN, 1e-2, 0.682, 1.134), (YOU, 1e-2, 0.978, 1.032), (POLAR_EXPRESS, 3e-3, 0.859, 1.141)],
    ids=["jordan", "you", "polar_express"],
)
def test_newton_schulz_keeps_singular_vectors_and_maps_values_into_the_known_band(
    coefficients: Coefficients, lowest: float, low: float, high: float
) -> None:
    """The bands are those of study/algorithms.md, for singular values in [lowest, 1] after normalization."""
    draw = np.random.default_rng(0)
    u, _ = np.linalg.qr(draw.standard_normal((1500, 600)))
    v, _ = np.linalg.qr(draw.standard_normal((600, 600)))
    values = np.geomspace(lowest, 0.07, 600)
    values = np.append(values[:-1], math.sqrt(1 - float((values[:-1] ** 2).sum())))  # Frobenius norm 1
    out = newton_schulz(u * values @ v.T, coefficients)
    inside = u.T @ out @ v
    found = np.diag(inside)
    rest = float(np.abs(inside - np.diag(found)).max())
    assert rest < 1e-10  # float64 rounding, magnified by the slope at zero
    # The study's numbers have three digits, and its [lowest, 1] is sampled at 600 places here
    assert low - 2e-3 < found.min() < low + 2e-2 and high - 2e-2 < found.max() < high + 2e-3, (found.min(), found.max())


@pytest.mark.parametrize("coefficients", [JORDAN, JORDAN_KELLER, YOU, POLAR_EXPRESS])
def test_newton_schulz_ignores_scale_and_orientation_and_leaves_zero_alone(coefficients: Coefficients) -> None:
    g: Array = np.random.default_rng(0).standard_normal((24, 40))
    np.testing.assert_allclose(
        newton_schulz(g.T, coefficients), newton_schulz(g, coefficients).T, atol=1e-13
    )  # same operations
    # eps (at most 1e-6) is added to a norm of 31: the input shifts by 3e-8 of itself, the output by a few times that
    np.testing.assert_allclose(newton_schulz(4.0 * g, coefficients), newton_schulz(g, coefficients), rtol=0, atol=1e-6)
    assert not newton_schulz(np.zeros((24, 40)), coefficients).any()


def test_a_kernel_of_four_axes_moves_as_its_flattened_matrix() -> None:
    draw = np.random.default_rng(0)
    kernel, g = draw.standard_normal((16, 3, 2, 2)), draw.standard_normal((16, 3, 2, 2))
    for build in (Muon, NorMuon, SFNorMuon):
        conv, flat = build({"w": kernel}, spectral=("w",)), build({"w": kernel.reshape(16, 12)}, spectral=("w",))
        conv.step({"w": g})
        flat.step({"w": g.reshape(16, 12)})
        np.testing.assert_array_equal(conv.weights()["w"].reshape(16, 12), flat.weights()["w"])
