"""FusionOpt's loss ratio: against its float64 twin, the first update that FusionOpt itself took, and a padded bank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusion_compile import compile_training_step, optim
from fusion_compile.optim import Named, Transform
from fusion_compile.optim._transform import BankInfo, Place, bound
from fusion_compile.optim.scale_lr_by_loss_ratio import scale_lr_by_loss_ratio
from tests.data.bowl import Bowl, loss_fn, noise
from tests.oracles.adamw import AdamW
from tests.oracles.loss_ratio import LossRatio
from tests.oracles.protocol import Oracle, Tensors
from tests.oracles.schedule_free import ScheduleFree
from tests.problems import BowlGradient
from tests.step_size_walk import (
    ODD,
    BowlLoss,
    Walk,
    adam,
    after_odd_gradients,
    check_laws,
    follow,
    together_and_alone,
)

LR = 2e-4
# On the Bowl the ratio falls from 2,400 to some 100: bounds within which it is at `maximum`, at neither, at `minimum`
BOUNDS: dict[str, dict[str, Any]] = {
    "pinned above": {},
    "free": {"minimum": 0.0, "maximum": math.inf, "beta": 0.9},
    "in and out": {"minimum": 1500.0, "maximum": 2300.0, "beta": 0.5},
    "pinned below": {"minimum": 1e4, "maximum": 1e5},
}
BASES: dict[str, tuple[Callable[[float], Transform], Callable[[Tensors, float], Oracle]]] = {
    "adam": (adam, lambda p, lr: AdamW(p, lr=lr, betas=(0.9, 0.95))),
    "schedule_free": (
        lambda lr: optim.schedule_free(adam(lr), lr),
        lambda p, lr: ScheduleFree(p, lambda q: AdamW(q, lr=lr, betas=(0.9, 0.95))),
    ),
}


def run(base: str, bounds: dict[str, Any], dtype: torch.dtype, twin_bounds: dict[str, float] | None = None) -> float:
    ours, theirs = BASES[base]
    # So that a rate is about LR whatever the bounds
    lr = (
        LR
        / {"pinned above": 1, "free": 100, "in and out": 200, "pinned below": 1000}[
            next(k for k, v in BOUNDS.items() if v == bounds)
        ]
    )
    start = BowlGradient().start
    oracle = LossRatio(theirs(start, lr), **(bounds if twin_bounds is None else twin_bounds))
    return follow(Walk(scale_lr_by_loss_ratio(ours(lr), **bounds), start, dtype), oracle, range(1, 101))


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("base", BASES)
def test_float64_is_the_twin(base: str, bounds: str) -> None:
    assert run(base, BOUNDS[bounds], torch.float64) <= 1e-9


@pytest.mark.parametrize("bounds", BOUNDS)
def test_float32_follows_the_twin(bounds: str) -> None:
    """100 roundings of weights of 0.05, each up to 3e-9, and those of the ratio's two means, 1e-7 of a step."""
    assert run("schedule_free", BOUNDS[bounds], torch.float32) <= 2e-6


@pytest.mark.parametrize(("bounds", "wrong"), [("pinned above", {"maximum": 9.99}), ("free", {"beta": 0.9001})])
def test_the_bounds_see_a_number_that_is_off(bounds: str, wrong: dict[str, float]) -> None:
    assert run("adam", BOUNDS[bounds], torch.float64, BOUNDS[bounds] | wrong) > 1e-6


def test_the_first_update_is_fusionopts() -> None:
    """What FusionOpt 3e58fe7 itself told after one update on the Bowl with `noise(1)`, in fp32, at lr 1e-3."""
    walk = Walk(scale_lr_by_loss_ratio(adam(1e-3)), BowlGradient().start)
    point = BowlGradient().start
    walk.step(BowlGradient()(point, 2), BowlLoss()(point, 2))  # update 2 of the Bowl here is what it calls 1
    told = walk.told()
    assert told["fusion/loss_ema"] == pytest.approx(103.29191589355469, rel=1e-6)
    assert told["fusion/gnorm_ema"] == pytest.approx(0.04348292201757431, rel=1e-6)
    assert told["fusion/loss_ema"] / told["fusion/gnorm_ema"] == pytest.approx(2375.45947265625, rel=1e-6)
    assert told["fusion/gamma_curr"] == pytest.approx(0.01, rel=1e-12)


def test_without_a_loss_the_ratio_is_one_and_means_begin_with_their_first_sample() -> None:
    walk, plain = (Walk(t, {"w": torch.ones(4)}) for t in (scale_lr_by_loss_ratio(adam(0.1)), adam(0.1)))
    for g in (1.0, 3.0):
        for one in (walk, plain):
            one.step({"w": torch.full((4,), g)})
    assert torch.equal(walk.params["w"], plain.params["w"])
    assert walk.told()["fusion/gnorm_ema"] == pytest.approx(0.98 * 1 + 0.02 * 3, rel=1e-12)
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(0.1, rel=1e-12)
    walk.step({"w": torch.full((4,), 3.0)}, 2.0)
    gnorm = 0.98 * (0.98 * 1 + 0.02 * 3) + 0.02 * 3
    assert walk.told()["fusion/loss_ema"] == 2.0  # not a fiftieth of it
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(0.1 * 2 / gnorm, rel=1e-9)
    walk.step({"w": torch.full((4,), 3.0)})  # no loss this time: the mean stays and counts
    gnorm = 0.98 * gnorm + 0.02 * 3
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(0.1 * 2 / gnorm, rel=1e-9)


@pytest.mark.parametrize(("loss", "ratio"), [(-5.0, 0.1), (0.0, 0.1), (0.5, 0.5), (1e30, 10.0)])
def test_the_ratio_stays_within_its_bounds(loss: float, ratio: float) -> None:
    walk = Walk(scale_lr_by_loss_ratio(adam(0.1)), {"w": torch.ones(4)})
    walk.step({"w": torch.ones(4)}, loss)
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(0.1 * ratio, rel=1e-9)


def test_padding_does_not_count_once_the_banks_are_known() -> None:
    """Two parameters of 33 and 5 entries, 16-byte aligned, with |g| = 2: the mean is 2 over 38 and not 44 entries."""
    members = (Place("a", (33,), 0), Place("b", (5,), 36))
    transform = scale_lr_by_loss_ratio(optim.partition({"scalar": adam(), "spectral": adam()}))
    g = torch.zeros(44)
    g[:33] = 2.0
    g[36:41] = -2.0
    matrices = {"spectral/3x4": torch.full((2, 3, 4), 2.0)}
    facts = {
        "scalar/float32": BankInfo(members),
        "spectral/3x4": BankInfo((Place("c", (3, 4), 0), Place("d", (3, 2, 2), 1))),
    }
    for one, mean in ((bound(transform, facts), 2.0), (transform, (76 + 48) / (44 + 24))):
        walk = Walk(one, {"scalar/float32": torch.zeros(44), **matrices})
        walk.step({"scalar/float32": g, **matrices}, 1.0)
        assert walk.told()["fusion/gnorm_ema"] == pytest.approx(mean, rel=1e-12)


def test_several_names_share_one_ratio_and_others_are_left_alone() -> None:
    parts = {role: optim.scale_by_learning_rate(Named(f"{role}_lr", 0.5)) for role in ("a", "b", "c")}
    walk = Walk(
        scale_lr_by_loss_ratio(optim.partition(parts), names=("b_lr", "a_lr")),
        {f"{role}/w": torch.zeros(2) for role in parts},
    )
    walk.step({f"{role}/w": torch.ones(2) for role in parts}, 3.0)
    assert {key: float(p[0]) for key, p in walk.params.items()} == pytest.approx(
        {"a/w": -1.5, "b/w": -1.5, "c/w": -0.5}, rel=1e-9
    )
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(1.5, rel=1e-9)


def test_a_rate_that_nobody_reads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"changes the rates 'scalar_lr', but adam reads 'beta1'.*name the rates"):
        scale_lr_by_loss_ratio(adam(), names=("scalar_lr",))
    with pytest.raises(ValueError, match="changes the rates of no name"):
        scale_lr_by_loss_ratio(adam(), names=())


def test_it_passes_on_what_is_inside() -> None:
    inner = optim.schedule_free(adam(0.1), 0.1)
    outer = scale_lr_by_loss_ratio(inner)
    assert outer.name == "scale_lr_by_loss_ratio(schedule_free(adam))" and outer.roles == inner.roles
    walk = Walk(outer, {"w": torch.tensor([1.0, -2.0])})
    for g in (1.0, -3.0):
        walk.step({"w": torch.full((2,), g)}, 1.0)
    x, z = walk.params["w"], walk.state.base.z["w"]
    torch.testing.assert_close(walk.point()["w"], z + 0.9 * (x - z), rtol=0, atol=0)
    nested = scale_lr_by_loss_ratio(scale_lr_by_loss_ratio(adam(0.1), maximum=2.0, beta=0.9), maximum=2.0, beta=0.9)
    walk = Walk(nested, {"w": torch.ones(1)})
    walk.step({"w": torch.ones(1)}, 100.0)
    assert walk.told()["fusion/gamma_curr"] == pytest.approx(0.2, rel=1e-12)  # the outer one's own


@pytest.mark.parametrize("base", BASES)
def test_laws(base: str) -> None:
    def make() -> Transform:
        return scale_lr_by_loss_ratio(BASES[base][0](1e-3))

    check_laws(make())
    stacked, alone = together_and_alone(make)
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_odd_gradients_leave_all_finite(kind: str, warm: bool) -> None:
    before, after = after_odd_gradients(scale_lr_by_loss_ratio(adam()), kind, warm=warm)
    if kind == "zero" and not warm:
        assert all(torch.equal(p, before[k]) for k, p in after.items())
    # Adam's step is at most lr √(1/(1-β₂)) = 4.5 lr, and the ratio at most 10
    assert all(float((p - before[k]).abs().max()) <= 11 * 45 * 1e-3 for k, p in after.items())


def test_the_whole_step_is_one_graph_and_resumes_bitwise() -> None:
    def fresh() -> Any:
        return compile_training_step(
            Bowl(), loss_fn, optimizer=scale_lr_by_loss_ratio(adam(1e-4)), mode=None, backend="aot_eager"
        )

    step = fresh()
    for i in range(3):
        step(*noise(i))
        step.hyperparameters["loss_ratio_maximum"] = 5.0 + i
    assert len(step.programs) == 1
    resumed = fresh()
    resumed.load_state_dict(step.state_dict())
    for i in range(3, 6):
        step(*noise(i))
        resumed(*noise(i))
    differing = [k for k, t in step._state.items() if not torch.equal(t, resumed._state[k])]
    assert not differing, differing
