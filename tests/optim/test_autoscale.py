"""Autoscale: its d is Prodigy's, the multiplier grows within bounds, samples favour no column, and the Bowl is trained
where FusionOpt's own form of it diverges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fusion_compile import compile_training_step, optim
from fusion_compile.optim import Transform
from fusion_compile.optim._transform import BankInfo, Place, bound
from fusion_compile.optim._tree import two_sum
from fusion_compile.optim.autoscale import autoscale, coprime_stride
from fusion_compile.optim.scale_lr_by_loss_ratio import scale_lr_by_loss_ratio
from tests.data.bowl import SHAPES, UPDATES, Bowl, loss_fn, noise, trace
from tests.data.official_step_sizes import StepSizeCase
from tests.oracles.adamw import AdamW
from tests.oracles.autoscale import Autoscale, Prodigy
from tests.oracles.protocol import Oracle, Tensors
from tests.oracles.schedule_free import ScheduleFree
from tests.problems import BowlGradient, run_oracle
from tests.step_size_walk import ODD, Walk, adam, after_odd_gradients, check_laws, follow, together_and_alone

LR = 1e-3
# Strides of slice_p = 11 on tensors by their own names: 33 = 3 · 11 takes the next that has no divisor in common
STRIDES = {name: 13 if name == "gain" else 11 for name in SHAPES}

OFFICIAL: dict[str, dict[str, Any]] = {
    "prodigy_safeguard_bias": {"safeguard_warmup": True, "use_bias_correction": True},
    "prodigy_beta1_0": {"betas": (0.0, 0.999)},
}


# -- the estimate is Prodigy's ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_twin_is_prodigy(name: str) -> None:
    """The float64 twin against the package in fp32: d to 2e-5, tensors within 3·floor + 2e-5 + 1e-7/‖displacement‖, to
    which comes one fp32 unit of a weight, 7e-9, over the displacement of an entry: while d is 1e-6, the package's
    weights barely leave the grid. (So the twin's are rounded to it after each update; d would be off by 2e-4 else.)"""
    case, gradient = StepSizeCase(name), BowlGradient()
    oracle = Prodigy(gradient.start, **OFFICIAL[name])
    ratios: dict[Any, float] = {}
    for update in range(1, max(UPDATES) + 1):
        oracle.step(gradient(oracle.gradient_point(), update))
        for p in oracle.params.values():
            p[...] = p.astype(np.float32)
        if update in UPDATES:
            found = trace(oracle.weights(), gradient.start)
            for n, t in found.items():
                of_an_entry = t[257] / math.sqrt(math.prod(SHAPES[n]))
                allowed = case.bound(update, "y", n) + 7e-9 / of_an_entry
                ratios[update, n] = case.error(update, "y", n, t) / allowed
            ratios[update, "d"] = abs(oracle.d / case.told(update, "d") - 1) / 2e-5
    far = {key: r for key, r in ratios.items() if not r <= 1}
    assert not far, far


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_d_is_prodigys_along_prodigys_own_path(dtype: torch.dtype) -> None:
    """Given the same iterates and no bound on growth. In fp32 p₀ - p is a difference of weights rounded to 3e-9, about
    3e-9/d of it: beside 1e-6 for the sums that is the bound. Measured: a tenth of it."""
    gradient = BowlGradient()
    prodigy = Prodigy(gradient.start)
    # d0 other than the lr: the estimate itself does not know the lr
    walk = Walk(autoscale(adam(LR), d0=1e-6, growth=math.inf, slice_p=1), gradient.start, dtype)
    rises = 0
    for update in range(1, 101):
        point = prodigy.weights()
        walk.params = {n: torch.from_numpy(p).to(dtype) for n, p in point.items()}
        g = gradient(point, update)
        before = prodigy.d
        walk.step(g)
        prodigy.step(g)
        rises += prodigy.d > before
        bound_ = 1e-12 if dtype == torch.float64 else 1e-6 + 3e-9 / before
        assert walk.told()["comp/autoscale_d"] == pytest.approx(prodigy.d, rel=bound_)
    assert rises >= 3 and prodigy.d > 1e-3


# -- the whole transform is its twin ----------------------------------------------------------------------------------

BASES: dict[str, tuple[Callable[[], Transform], Callable[[Tensors], Oracle]]] = {
    "adam": (lambda: adam(LR), lambda p: AdamW(p, lr=LR, betas=(0.9, 0.95))),
    "schedule_free": (
        lambda: optim.schedule_free(adam(LR), LR),
        lambda p: ScheduleFree(p, lambda q: AdamW(q, lr=LR, betas=(0.9, 0.95))),
    ),
}


def run(base: str, dtype: torch.dtype, options: dict[str, Any], **twin_options: Any) -> float:
    start, (ours, theirs) = BowlGradient().start, BASES[base]
    oracle = Autoscale(theirs(start), **{"d0": LR, **options, **twin_options})
    options = {k: v for k, v in options.items() if k != "strides"}
    slice_p = 11 if twin_options.get("strides", STRIDES) else 1
    walk = Walk(autoscale(ours(), slice_p=slice_p, **options), start, dtype)
    return follow(walk, oracle, range(1, 101), loss=False)


@pytest.mark.parametrize("strides", [STRIDES, {}], ids=["sampled", "every entry"])
@pytest.mark.parametrize("options", [{}, {"growth": 1.1, "coefficient": 0.5, "beta3": 0.99}, {"growth": math.inf}])
@pytest.mark.parametrize("base", BASES)
def test_float64_is_the_twin(base: str, options: dict[str, Any], strides: dict[str, int]) -> None:
    assert run(base, torch.float64, options, strides=strides) <= 1e-9


@pytest.mark.parametrize("base", BASES)
def test_float32_follows_the_twin(base: str) -> None:
    """100 roundings of weights of 0.05, each up to 3e-9, against a displacement of 0.05 (0.02 of the average): 6e-6 if
    all went one way. d, which growth limits here, adds 1e-7 of it an update. Measured: 8e-7 at most."""
    assert run(base, torch.float32, {}, strides=STRIDES) <= 4e-6


@pytest.mark.parametrize(
    "wrong",
    [{"growth": 1.0201}, {"beta3": 0.999, "growth": math.inf}, {"coefficient": 0.99, "growth": math.inf}],
)
def test_the_bounds_see_a_number_that_is_off(wrong: dict[str, Any]) -> None:
    right = {k: v for k, v in {"growth": math.inf}.items() if k in wrong and wrong[k] == v}
    assert run("adam", torch.float64, right, strides=STRIDES, **wrong) > 1e-5


def test_inside_schedule_free_the_estimate_is_taken_at_z_and_outside_at_y() -> None:
    start = {"w": torch.tensor([1.0, -2.0, 0.5])}

    def expected(points: list[torch.Tensor], grads: list[torch.Tensor]) -> float:
        d = d_max = 0.1
        numerator, s = 0.0, torch.zeros(3, dtype=torch.float64)
        for p, g in zip(points, grads, strict=True):
            numerator = math.sqrt(0.999) * numerator + d * d / 0.1 * float((g * (points[0] - p)).sum())
            s = math.sqrt(0.999) * s + d * d / 0.1 * g
            d = d_max = max(d_max, numerator / float(s.abs().sum()))
        return d

    options: dict[str, Any] = {"growth": math.inf, "slice_p": 1}
    outside = Walk(autoscale(optim.schedule_free(adam(0.1), 0.1), **options), start)
    inside = Walk(optim.schedule_free(autoscale(adam(0.1), **options), 0.1), start)
    for walk in (outside, inside):
        ys, zs = [], []
        for _ in range(6):
            ys.append(walk.point()["w"])
            zs.append((walk.state if walk is inside else walk.state.base).z["w"])
            walk.step({"w": ys[-1]})
        wanted = expected(zs if walk is inside else ys, ys)
        assert walk.told()["comp/autoscale_d"] == pytest.approx(wanted, rel=1e-12) and wanted > 0.1
    assert abs(expected(zs, ys) / expected(ys, ys) - 1) > 0.01  # else the two were one


# -- the multiplier ---------------------------------------------------------------------------------------------------


def normuon(lr: float) -> Transform:
    spectral = optim.chain(
        optim.orthogonalize(0.95, matmul_dtype=torch.float32),
        optim.normalize_neurons(0.95, scale="match_rms"),
        optim.scale_by_learning_rate(lr),
    )
    return optim.partition({"spectral": spectral, "scalar": adam(lr)}, name="normuon")


def train(transform: Transform, n_steps: int = 120) -> tuple[list[float], list[float]]:
    """Losses before each update, and the multiplier of each."""
    step = compile_training_step(Bowl(), loss_fn, optimizer=transform, mode="eager")
    losses, multipliers = [], []
    for i in range(n_steps):
        losses.append(float(step(*noise(i))))
        multipliers.append(float(step.metrics["comp/autoscale_mult"]))
    return losses, multipliers


WRAPPED: dict[str, Callable[[], Transform]] = {
    "adam": lambda: autoscale(adam(LR)),
    "normuon": lambda: autoscale(normuon(LR)),
    "sf_normuon": lambda: autoscale(optim.sf_normuon(LR, matmul_dtype=torch.float32)),
    "inside schedule_free": lambda: optim.schedule_free(autoscale(normuon(LR)), LR),
    "with the loss ratio": lambda: autoscale(scale_lr_by_loss_ratio(normuon(LR / 10)), d0=LR),
}


@pytest.mark.parametrize("which", WRAPPED)
def test_it_trains_where_fusionopts_form_diverges(which: str) -> None:
    """At FusionOpt's lr of 1e-3 on the Bowl: to a fifth of the first loss, which no later one exceeds. Inside
    Schedule-Free to a third: its average weighs the early, small steps like the late ones, not knowing the multiplier.
    """
    losses, multipliers = train(WRAPPED[which]())
    share = 1 / 3 if which == "inside schedule_free" else 1 / 5
    assert losses[-1] < share * losses[0] == share * max(losses), (losses[0], losses[-1], max(losses))
    growth = np.array(multipliers[1:]) / np.array(multipliers[:-1])
    assert multipliers[0] == 1.0 and growth.min() >= 1 - 1e-6 and growth.max() <= 1.02 * (1 + 1e-6)  # fp32
    assert multipliers[-1] > 5  # it found that the steps were too small
    assert losses[-1] < train_without(which)


def train_without(which: str) -> float:
    """The last loss of the same optimizer with the multiplier held at 1."""
    step = compile_training_step(Bowl(), loss_fn, optimizer=WRAPPED[which](), mode="eager")
    step.hyperparameters["autoscale_growth"] = 1.0
    losses = [float(step(*noise(i))) for i in range(120)]
    assert float(step.metrics["comp/autoscale_mult"]) == 1.0
    return losses[-1]


def test_fusionopts_choices_diverge_here_too() -> None:
    """d0 = 1e-6 under an lr of 1e-3, unbounded growth, every 16th entry, the loss ratio on top: a jump of more than a
    thousand in one update."""
    losses, multipliers = train(
        autoscale(scale_lr_by_loss_ratio(normuon(LR)), d0=1e-6, growth=math.inf, slice_p=16), 20
    )
    assert multipliers[2] / multipliers[1] > 1000
    assert losses[-1] > 1e5


def test_d0_is_the_lr_of_the_base_and_a_schedule_needs_it_given() -> None:
    assert Walk(autoscale(adam(0.25)), {"w": torch.ones(3)}).told()["comp/autoscale_d"] == 0.25
    scheduled = optim.chain(optim.scale_by_learning_rate(optim.constant(0.5, warmup_steps=4)), name="sgd")
    with pytest.raises(ValueError, match=r"takes d0 from 'lr', which follows a schedule .* give d0, its peak"):
        autoscale(scheduled)
    assert Walk(autoscale(scheduled, d0=0.5), {"w": torch.ones(3)}).told()["comp/autoscale_d"] == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d0": 0.0}, "d0=0.0 is not a first estimate"),
        ({"d0": math.inf}, "d0=inf is not a first estimate"),
        ({"slice_p": 0}, "slice_p=0 is not a stride"),
        ({"slice_p": 2.0}, "slice_p=2.0 is not a stride"),
        ({"names": ("scalar_lr",)}, "changes the rates 'scalar_lr', but adam reads"),
    ],
)
def test_an_impossible_option_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        autoscale(adam(), **options)


# -- samples ----------------------------------------------------------------------------------------------------------


def test_a_stride_shares_no_divisor_with_a_dimension() -> None:
    assert coprime_stride(1, (128, 33)) == 1
    assert coprime_stride(16, (192, 128)) == 17
    assert coprime_stride(11, (1152, 384)) == 11
    assert coprime_stride(11, (33, 26)) == 17  # 12, 14, 15 and 16 too
    assert coprime_stride(4, ()) == 4


def test_every_column_and_every_row_is_sampled_about_equally() -> None:
    """FusionOpt's ``flatten()[::16]`` sees 8 of 128 columns."""
    m, n = 192, 128
    marks = torch.arange(m * n, dtype=torch.float64).reshape(1, m, n)
    kept = Walk(autoscale(adam(), slice_p=16), {"spectral/a": marks}).state.start["spectral/a"][0].numpy().astype(int)
    assert len(kept) == -(-m * n // 17)
    for places, size in ((kept % n, n), (kept // n, m)):
        counts = np.bincount(places, minlength=size)
        assert counts.min() >= counts.mean() - 1 and counts.max() <= counts.mean() + 1
    assert len(set(np.arange(0, m * n, 16) % n)) == 8


def test_the_stride_of_a_flat_bank_follows_its_members() -> None:
    members = (Place("a", (22, 4), 0), Place("b", (39,), 88))
    flat = {"scalar/float32": torch.arange(128.0)}
    base = optim.partition({"scalar": adam()})
    alone = autoscale(base).init(flat)
    known = bound(autoscale(base), {"scalar/float32": BankInfo(members)}).init(flat)
    key = "scalar/float32/sampled"
    assert torch.equal(alone.start[key], flat["scalar/float32"][::11])
    assert torch.equal(known.start[key], flat["scalar/float32"][::17])  # 11 divides 22, 13 divides 39
    whole = autoscale(base, slice_p=1).init(flat)
    assert torch.equal(whole.start["scalar/float32"], flat["scalar/float32"])  # of a bank's form, under its key


def test_sums_that_run_for_ever_do_not_stand_still() -> None:
    """With β₃ = 1 nothing decays. After 10^9 equal gradients the next ones still count; in fp32 they would be lost."""
    start = {"w": torch.ones(3)}
    walk = Walk(autoscale(adam(), beta3=1.0, growth=1.0, slice_p=1), start, torch.float32)
    walk.step({"w": torch.full((3,), 0.5)})
    (s,) = walk.state.s.values()
    one = s.clone()
    s.mul_(10**9)
    start_of_s = s.double()
    for _ in range(400):
        walk.step({"w": torch.full((3,), 0.5)})
    (after,), (lost,) = walk.state.s.values(), walk.state.lost.values()
    assert torch.equal(s + one, s)
    # What is lost is below a unit of s, 0.03, and is itself rounded by 2^-24 of it, 400 times: 1e-12 of s.
    torch.testing.assert_close(after.double() + lost.double(), start_of_s + 400 * one.double(), rtol=1e-12, atol=0)
    assert (after > s).all() and walk.state.numerator.dtype == torch.float64


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiler_keeps_what_rounding_took(backend: str) -> None:
    a, b = torch.tensor([1.0, 1e9, -3.0]), torch.tensor([1e-9, 1.25, 1e-8])
    total, lost = torch.compile(two_sum, backend=backend, fullgraph=True)(a, b)
    assert torch.equal(total, a + b)
    assert torch.equal(total.double() + lost.double(), a.double() + b.double())


def test_a_checkpoint_whose_sums_are_fp32_loads() -> None:
    """As version 0.1 wrote them, without what rounding took."""
    step, resumed = (
        compile_training_step(Bowl(), loss_fn, optimizer=autoscale(adam(LR)), mode="eager") for _ in range(2)
    )
    step(*noise(0))
    saved = step.state_dict()
    old = {n: t.float() for n, t in saved["optimizer"].items() if not n.startswith("lost.")}
    assert len(old) < len(saved["optimizer"])
    assert [n for n, t in saved["optimizer"].items() if t.dtype == torch.float64] == ["numerator"]
    resumed.load_state_dict({**saved, "optimizer": old})
    step(*noise(1))
    resumed(*noise(1))
    assert float(resumed.metrics["comp/autoscale_mult"]) == pytest.approx(
        float(step.metrics["comp/autoscale_mult"]), rel=1e-6
    )


# -- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slice_p", [1, 7])
@pytest.mark.parametrize("base", BASES)
def test_laws(base: str, slice_p: int) -> None:
    def make() -> Transform:
        return autoscale(BASES[base][0](), slice_p=slice_p)

    check_laws(make())
    stacked, alone = together_and_alone(make)
    torch.testing.assert_close(stacked, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ODD)
def test_odd_gradients_leave_all_finite(kind: str, warm: bool) -> None:
    before, after = after_odd_gradients(autoscale(adam()), kind, warm=warm)
    if kind == "zero" and not warm:
        assert all(torch.equal(p, before[k]) for k, p in after.items())


def test_the_whole_step_is_one_graph_and_resumes_bitwise() -> None:
    """d, N, s and p₀ are state: FusionOpt forgets them."""

    def fresh(seed: int) -> Any:
        transform = autoscale(optim.sf_normuon(1e-3, matmul_dtype=torch.float32), d0=1e-4)
        return compile_training_step(Bowl(seed), loss_fn, optimizer=transform, mode=None, backend="aot_eager")

    step = fresh(0)
    for i in range(4):
        step(*noise(i))
        step.hyperparameters["autoscale_growth"] = 1.05
    assert len(step.programs) == 1
    resumed = fresh(1)  # other weights, so another p₀, until the state is loaded
    resumed.load_state_dict(step.state_dict())
    for i in range(4, 7):
        step(*noise(i))
        resumed(*noise(i))
    differing = [k for k, t in step._state.items() if not torch.equal(t, resumed._state[k])]
    assert not differing, differing
    assert float(step.metrics["comp/autoscale_mult"]) > 1.1


def test_prodigys_path_is_not_a_standstill() -> None:
    """The twin really travels, else the comparison along its path would say little."""
    oracle = Prodigy(BowlGradient().start)
    run_oracle(oracle, range(1, 101))
    moved = max(float(np.abs(p - BowlGradient().start[n]).max()) for n, p in oracle.weights().items())
    assert moved > 0.05
