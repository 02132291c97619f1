"""The options of `schedule_free`: against averages written out as sums, and the default against the plain recursion."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile._state.flat_tree import flatten
from tests.oracles.adamw import AdamW
from tests.oracles.protocol import Given, Tensors, float64_copies
from tests.oracles.schedule_free_plus import annealed_beta
from tests.problems import BowlGradient
from tests.step_size_walk import Walk, adam, after_odd_gradients, banks, check_laws, follow, together_and_alone


class AverageByItsSum:
    """Schedule-Free over Adam, x as the sum of w z over the sum of w from the start, so without any c."""

    def __init__(self, params: Given, **options: Any) -> None:
        self.z = AdamW(params, betas=(0.9, 0.95))
        self.x, self.y = float64_copies(params), float64_copies(params)
        self.options, self.k, self.rates = options, 0, list[float]()
        self.weighted = {n: 0.0 * p for n, p in self.x.items()}
        self.weights_sum = 0.0

    def gradient_point(self) -> Tensors:
        return float64_copies(self.y)

    def weights(self) -> Tensors:
        return float64_copies(self.x)

    def step(self, grads: Given) -> None:
        o = self.options
        self.z.step(grads)
        self.rates.append(self.z.lr)
        if self.k < o.get("c_warmup", 0):
            self.x = float64_copies(self.z.params)
        else:
            rate = self.rates[-1] if o.get("average") == "lr" else max(self.rates)
            weight = (self.k + 1) ** o.get("r", 0) * rate ** o.get("weight_lr_power", 2)
            self.weights_sum += weight
            for n, z in self.z.params.items():
                self.weighted[n] = self.weighted[n] + weight * z
                self.x[n] = self.weighted[n] / self.weights_sum
        beta = annealed_beta(self.k, 0.9, o.get("beta_max", 0.965), o.get("anneal", 0))
        self.y = {n: beta * self.x[n] + (1 - beta) * z for n, z in self.z.params.items()}
        self.k += 1


OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "r": {"r": 2.0},
    "r broken": {"r": 0.5},
    "power": {"weight_lr_power": 1.0},
    "no power": {"weight_lr_power": 0.0},
    "average lr": {"average": "lr"},
    "c_warmup": {"c_warmup": 12},
    "anneal": {"anneal": 60},
    "anneal to": {"anneal": 60, "beta_max": 0.99},
    "all": {"r": 2.0, "weight_lr_power": 3.0, "average": "lr", "c_warmup": 12, "anneal": 60, "beta_max": 0.98},
}


def up_and_down(update: int) -> float:
    """A warm-up of 10 updates, a plateau, and a fall from 50 on to a quarter."""
    return 5e-3 * min(1.0, update / 10, max(0.25, 1 - (update - 50) / 40))


def run(options: dict[str, Any], twin_options: dict[str, Any], dtype: torch.dtype) -> float:
    walk = Walk(optim.schedule_free(adam(5e-3), 5e-3, **options), BowlGradient().start, dtype)
    oracle = AverageByItsSum(BowlGradient().start, **twin_options)

    def each(update: int) -> None:
        walk.live["lr"] = oracle.z.lr = up_and_down(update)

    return follow(walk, oracle, range(1, 101), each, loss=False)


@pytest.mark.parametrize("which", OPTIONS)
def test_option_is_its_weighted_mean_in_float64(which: str) -> None:
    """100 updates; what differs is the rounding of a recursion and of a sum."""
    assert run(OPTIONS[which], OPTIONS[which], torch.float64) <= 1e-9


@pytest.mark.parametrize("which", OPTIONS)
def test_option_in_float32(which: str) -> None:
    """100 roundings of weights of 0.05, each 3e-9 at most, against a displacement of about 0.05: 6e-6 if all went one
    way, 6e-7 at random. Measured: 2e-7 at most."""
    assert run(OPTIONS[which], OPTIONS[which], torch.float32) <= 1e-6


@pytest.mark.parametrize("which", [name for name in OPTIONS if name != "none"])
def test_every_option_makes_a_difference_that_the_bounds_see(which: str) -> None:
    assert run(OPTIONS[which], {}, torch.float64) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_options_every_bit_is_that_of_the_plain_recursion(dtype: torch.dtype) -> None:
    lr = 1e-2
    transform = optim.schedule_free(adam(lr), lr, 0.9, decay_at_y=0.1)
    walk, base = Walk(transform, banks(dtype), dtype), adam(lr)
    x, z = dict(walk.params), {k: p.clone() for k, p in walk.params.items()}
    state = base.init(z)
    lr_max, weight_sum = torch.zeros((), dtype=dtype), torch.zeros((), dtype=torch.float64)
    for update in range(20):
        walk.live["lr"] = lr * min(1, (update + 1) / 5) * (1 if update < 12 else 0.5)
        h = walk.context().hyperparameters
        grads = {k: torch.randn_like(p) for k, p in x.items()}
        y = {k: z[k] + h["schedule_free_beta"] * (x[k] - z[k]) for k in x}
        assert all(torch.equal(point, y[k]) for k, point in walk.point().items())
        moves, state = base.update(grads, state, z, walk.context())
        z = {k: z[k] + moves[k] for k in x}
        z = {k: z[k] - h["lr"] * h["weight_decay"] * y[k] for k in x}
        lr_max = torch.maximum(lr_max, h["lr"])
        weight_sum = weight_sum + lr_max * lr_max
        c = (lr_max * lr_max / weight_sum).to(dtype)
        x = {k: p + c * (z[k] - p) for k, p in x.items()}
        walk.step(grads)
        assert all(torch.equal(p, x[k]) for k, p in walk.params.items())
        assert all(torch.equal(p, z[k]) for k, p in walk.state.z.items())


def test_the_count_of_updates_is_state_only_where_an_option_needs_it() -> None:
    def kept(**options: Any) -> set[str]:
        return {path for path, _ in flatten(optim.schedule_free(adam(), **options).init(banks()))}

    without = kept()
    options: dict[str, Any]
    for options in ({"average": "lr"}, {"weight_lr_power": 1.0}):
        assert kept(**options) == without
    for options in ({"anneal": 5}, {"c_warmup": 5}, {"r": 1.0}):
        assert kept(**options) - without == {"taken/k"}
    assert {"lr_max", "weight_sum"} < without
    assert "schedule_free_beta_max" not in optim.schedule_free(adam()).hyperparameters
    assert optim.schedule_free(adam(), anneal=5).hyperparameters["schedule_free_beta_max"] == 0.965


def test_the_point_of_an_update_is_where_the_last_one_left_it() -> None:
    """y after update k is at β_k, however often it is asked for."""
    walk = Walk(optim.schedule_free(adam(0.1), 0.1, anneal=4), {"w": torch.tensor([1.0, -2.0])})
    assert torch.equal(walk.point()["w"], walk.params["w"])
    for k in range(7):
        walk.step({"w": torch.randn(2)})
        x, z, y = walk.params["w"], walk.state.z["w"], walk.point()["w"]
        beta = 1 - 0.1 ** (1 - min(k / 4, 1)) * 0.035 ** min(k / 4, 1)
        torch.testing.assert_close(y, beta * x + (1 - beta) * z, rtol=1e-12, atol=1e-14)


def test_during_c_warmup_x_is_z() -> None:
    walk = Walk(optim.schedule_free(adam(0.1), 0.1, c_warmup=3), {"w": torch.tensor([1.0, -2.0])})
    for k in range(6):
        walk.step({"w": torch.randn(2)})
        # c is 1 in the fourth update too: it is the first that weighs
        close = bool((walk.params["w"] - walk.state.z["w"]).abs().max() < 1e-14)
        assert close == (k <= 3)
    assert float(walk.state.weight_sum) == pytest.approx(3 * 0.1**2, rel=1e-12)


def test_a_start_at_lr_zero_is_forgotten_with_r_and_c_warmup_too() -> None:
    walk = Walk(optim.schedule_free(adam(0.1), 0.1, r=2.0, c_warmup=1), {"w": torch.tensor([1.0, -2.0])})
    walk.live["lr"] = 0.0
    for _ in range(3):
        walk.step({"w": torch.randn(2)})
    assert torch.equal(walk.params["w"], torch.tensor([1.0, -2.0], dtype=torch.float64))
    walk.live["lr"] = 0.1
    walk.step({"w": torch.randn(2)})
    torch.testing.assert_close(walk.params["w"], walk.state.z["w"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("which", OPTIONS)
def test_laws(which: str) -> None:
    def make() -> optim.Transform:
        return optim.schedule_free(adam(), **OPTIONS[which])

    check_laws(make())
    stacked, alone = together_and_alone(make)
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-12)
    for kind in ("zero", "1e-9", "1e4", "one row dead"):
        for warm in (False, True):
            before, after = after_odd_gradients(make(), kind, warm=warm)
            if kind == "zero" and not warm:
                assert all(torch.equal(p, before[k]) for k, p in after.items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"average": "mean"}, "average='mean' is not known; use one of 'lr_max', 'lr'"),
        ({"anneal": -1}, "anneal=-1 is not a number of updates"),
        ({"c_warmup": 2.5}, "c_warmup=2.5 is not a number of updates"),
        ({"r": -1.0}, "r=-1.0 is not an exponent"),
        ({"weight_lr_power": float("nan")}, "weight_lr_power=nan is not an exponent"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        optim.schedule_free(adam(), **options)
