"""`fusion`: every sensible subset of components builds, is one graph and resumes bitwise; the others say why not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fusion_compile import TrainingStep, compile_training_step, optim
from fusion_compile.optim.fusion import COMPONENTS
from tests.data.bowl import Bowl, noise
from tests.data.bowl import loss_fn as bowl_loss
from tests.oracles.full_fusion import FullFusion
from tests.oracles.protocol import float64_copies
from tests.problems import BowlGradient

FUSIONOPT = ("ns5", "normuon", "sf", "mona", "shampoo", "cautious", "snr", "autoscale")
OURS = ("plain_shampoo", "hyperball")


class Small(nn.Module):
    """Two matrices of one shape, a wide one and a bias, in a quadratic; the batch is gradient noise."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(2))
        self.wide = nn.Linear(12, 6)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=draw) * 0.3


def loss_fn(model: nn.Module, noise: Tensor) -> Tensor:
    total = torch.zeros(())
    for i, p in enumerate(model.parameters()):
        target = torch.linspace(-0.5, 0.5, p.numel()).view(p.shape)
        total = total + ((p - target).square() * (i + 1)).mean() + (p * noise[: p.numel()].view(p.shape)).mean()
    return total


def batch(i: int) -> Tensor:
    return 0.1 * torch.randn(72, generator=torch.Generator().manual_seed(i))


def make(components: Iterable[str], **options: object) -> optim.Transform:
    return optim.fusion(components, 1e-2, every=5, **options)  # type: ignore[arg-type]


def compiled(transform: optim.Transform, backend: str = "eager") -> TrainingStep:
    """`backend="eager"`: Dynamo's graph, run as it is."""
    return compile_training_step(Small(), loss_fn, optimizer=transform, backend=backend, force_spectral=["weight"])


def sensible(components: Iterable[str]) -> bool:
    on = set(components)
    bounded = bool(on & {"ns5", "normuon", "hyperball"})
    return (
        (bounded or not on & {"shampoo", "plain_shampoo"})
        and not {"sf", "hyperball"} <= on
        and not {"shampoo", "plain_shampoo"} <= on
    )


def subsets(names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from combinations(names, size)


def test_what_is_sensible_is_what_builds() -> None:
    """All 1,024 subsets, with the two components of our own."""
    assert set(COMPONENTS) == {*FUSIONOPT, *OURS}
    for components in subsets((*FUSIONOPT, *OURS)):
        if sensible(components):
            assert make(components).hyperparameters["lr"] == 1e-2
        else:
            with pytest.raises(ValueError, match=r"diverges|keep one of them"):
                make(components)


def covering(candidates: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """A few of `candidates` in which every two components occur together, apart, and one without the other."""

    def pairs(components: tuple[str, ...]) -> set[tuple[str, bool, str, bool]]:
        return {(a, a in components, b, b in components) for a, b in combinations(FUSIONOPT, 2)}

    chosen: set[tuple[str, ...]] = set()
    left = set().union(*map(pairs, candidates))
    while left:
        best = max(candidates, key=lambda c: len(pairs(c) & left))
        chosen.add(best)
        left -= pairs(best)
    return chosen


SUBSETS = [c for c in subsets(FUSIONOPT) if sensible(c)]
COVERING = covering(SUBSETS)


@pytest.mark.parametrize(
    "components",
    [pytest.param(c, id="+".join(c), marks=() if c in COVERING else pytest.mark.exhaustive) for c in SUBSETS],
)
def test_every_subset_of_fusionopts_components_is_one_graph_and_resumes_bitwise(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    """Twenty steps, lr changing at each; a run saved after seven that goes on elsewhere ends at the same bits."""
    step, resumed = compiled(make(components)), None
    for i in range(20):
        step.hyperparameters["lr"] = 1e-2 / (1 + i)
        if i == 7:
            step.save(tmp_path / "ck")
        step(batch(i))
    assert len(step.programs) == 1  # and no recompile: the step refuses one
    assert step.programs[0].findings(thorough=False) == ()
    assert all(bool(torch.isfinite(p).all()) for p in step.model.parameters())
    # The twin that resumes is not compiled: the same operations one by one, and of its own step objects.
    resumed = compile_training_step(
        Small(), loss_fn, optimizer=make(components), mode="eager", force_spectral=["weight"]
    )
    resumed.load(tmp_path / "ck")
    for i in range(7, 20):
        resumed.hyperparameters["lr"] = 1e-2 / (1 + i)
        resumed(batch(i))
    differing = [k for k, t in step._state.items() if not torch.equal(t, resumed._state[k])]
    assert not differing


def test_the_full_set_lowered_to_aten_has_nothing_that_waits_or_cannot_be_captured() -> None:
    step = compiled(optim.full_fusion(1e-2, every=5), backend="aot_eager")
    for i in range(6):
        step(batch(i))
    assert step.programs[0].findings(thorough=True) == ()
    assert set(step.periodic_programs) == {"kl_shampoo_bases"}
    assert "linalg_eigh" not in step.programs[0].aten.code


@pytest.mark.parametrize(
    ("components", "options", "said"),
    [
        ({"ns6"}, {}, "unknown component 'ns6'; fusion\\(\\) knows ns5, normuon"),
        ({"shampoo"}, {}, "'shampoo' alone diverges: nothing bounds the size .* Add an orthogonalizer"),
        ({"plain_shampoo", "sf"}, {}, "'plain_shampoo' alone diverges"),
        ({"ns5", "shampoo", "plain_shampoo"}, {}, "precondition the same momentum"),
        ({"ns5", "sf", "hyperball"}, {}, "'hyperball' keeps weights on a sphere"),
        ({"ns5"}, {"step_size": "polyak"}, "needs 'sf'"),
        ({"ns5", "hyperball"}, {"step_size": "loss_ratio"}, "lr is an angle"),
        ({"ns5"}, {"step_size": "polyack"}, "step_size='polyack' is not known; use one of None, 'loss_ratio'"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(
    components: set[str], options: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        make(components, **options)


def test_a_string_for_a_set_is_noticed() -> None:
    with pytest.raises(TypeError, match="components='ns5' is a string; give a set of names"):
        optim.fusion("ns5")


def test_fusionopts_label_and_the_papers_name_are_one_component() -> None:
    assert make({"ns5", "kl_shampoo"}).name == make({"ns5", "shampoo"}).name == "fusion(ns5, shampoo)"


def test_ns5_normuon_sf_is_the_sf_normuon_recipe_bitwise() -> None:
    """Same equations in the same order; only where state lies differs."""
    both = [make({"ns5", "normuon", "sf"}, weight_decay=0.05), optim.sf_normuon(1e-2)]
    steps = [
        compile_training_step(Small(), loss_fn, optimizer=t, mode="eager", force_spectral=["weight"]) for t in both
    ]
    for i in range(20):
        losses = [step(batch(i)) for step in steps]
        assert torch.equal(*losses)
    for a, b in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(a, b)


def test_each_component_changes_what_is_computed() -> None:
    """A component that were dropped on the way would leave the same weights."""

    def after(components: set[str]) -> list[Tensor]:
        step = compile_training_step(
            Small(), loss_fn, optimizer=make(components), mode="eager", force_spectral=["weight"]
        )
        for i in range(12):
            step(batch(i))
        return [p.detach().clone() for p in step.model.parameters()]

    base = after({"ns5"})
    for component in (*FUSIONOPT, *OURS):
        if component != "ns5":
            assert any(not torch.equal(a, b) for a, b in zip(base, after({"ns5", component}), strict=True)), component


def test_diagnostics_are_told_under_fusionopts_names() -> None:
    transform = make({*FUSIONOPT}, step_size="loss_ratio", audit_every=5)
    step = compile_training_step(Small(), loss_fn, optimizer=transform, mode="eager", force_spectral=["weight"])
    for i in range(6):
        step(batch(i))
    metrics = step.metrics
    told = {
        "fusion/gamma_curr", "fusion/loss_ema", "fusion/gnorm_ema", "comp/cautious_keep_frac", "comp/snr_gain",
        "comp/autoscale_mult", "comp/autoscale_d", "comp/momentum_norm", "comp/shampoo_gain", "comp/ns5_gain",
        "comp/normuon_gain", "comp/spectral_update_norm",
    }  # fmt: skip
    assert told <= metrics.keys(), told - metrics.keys()
    assert all(metrics[name].ndim == 0 and bool(torch.isfinite(metrics[name])) for name in told)
    assert 0 < float(metrics["comp/cautious_keep_frac"]) < 1
    assert any(name.startswith("fusion/audit_") for name in metrics)


@pytest.mark.parametrize("step_size", ["loss_ratio", "polyak"])
def test_a_step_size_that_depends_on_the_loss_stays_in_the_one_graph(step_size: str) -> None:
    step = compiled(make({"ns5", "normuon", "sf"}, step_size=step_size))
    for i in range(8):
        step(batch(i))
    assert len(step.programs) == 1
    assert bool(torch.isfinite(step.metrics["fusion/gamma_curr"]))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_full_fusion_follows_its_twin_for_100_steps(dtype: torch.dtype, bound: float) -> None:
    """On the Bowl's square matrix, whose gradients have full rank, and its vectors.

    Seen: 6e-11 (Newton-Schulz multiplies what is small by 500) and 6e-7; fp32 rounds at 6e-8, and other kernels sum in
    another order.
    """
    gradient = BowlGradient()
    bowl = Bowl().to(dtype)
    step = compile_training_step(
        bowl,
        bowl_loss,
        optimizer=optim.full_fusion(1e-2, matmul_dtype=dtype),
        mode="eager",
        force_scalar=["tall", "wide"],
    )
    twin = FullFusion(gradient.start, spectral=("square",), lr=1e-2)
    for update in range(1, 101):
        step(*(n.to(dtype) for n in noise(update - 1)))
        twin.step(gradient(twin.gradient_point(), update))
    found, wanted = float64_copies(dict(bowl.named_parameters())), twin.weights()
    for name, w in wanted.items():
        far = np.linalg.norm(found[name] - w) / np.linalg.norm(w - gradient.start[name])
        assert far < bound, (name, far)
