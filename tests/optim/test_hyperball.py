"""Hyperball against its twin, on the sphere and off it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fusion_compile.optim import Transform, chain, orthogonalize
from fusion_compile.optim._transform import BankInfo, Place, bound
from fusion_compile.optim.hyperball import hyperball
from fusion_compile.optim.scale_by_mona import scale_by_mona
from tests.data.bowl import SPECTRAL
from tests.optim.walks import Walk, a_bank_moves_as_its_members, distance, keeps_the_laws, nodes
from tests.oracles import protocol
from tests.oracles.hyperball import Hyperball
from tests.oracles.mona import Mona


def over_mona(start: protocol.Tensors, lr: float) -> Hyperball:
    return Hyperball(start, lr=lr, direction=Mona(start).direction)


@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.5])
@pytest.mark.parametrize(
    ("transform", "twin"),
    [(lambda lr: hyperball(lr), Hyperball), (lambda lr: chain(scale_by_mona(), hyperball(lr)), over_mona)],
)
def test_hyperball_follows_its_twin(
    transform: Callable[[float], Transform], twin: Callable[..., Hyperball], lr: float
) -> None:
    """Measured 1e-14 at lr = 1e-3, where the displacement is small, and 1e-15 else."""
    assert distance(transform(lr), partial(twin, lr=lr), torch.float64, SPECTRAL) <= 1e-9


def test_fp32_follows_the_float64_twin() -> None:
    """Each of 100 steps rounds the weights (6e-8 relative), which are about as large as the displacement. Measured:
    2e-7."""
    assert distance(hyperball(0.02), partial(Hyperball, lr=0.02), torch.float32, SPECTRAL) <= 6e-6


def test_the_bound_sees_an_lr_that_is_off_by_a_thousandth() -> None:
    assert distance(hyperball(0.02002), partial(Hyperball, lr=0.02), torch.float64, SPECTRAL) > 1e-5


@pytest.mark.parametrize("lr", [1e-3, 0.02, 0.5, 1.0, 3.0])
def test_every_matrix_keeps_its_norm_and_turns_by_about_lr(lr: float) -> None:
    """To fp32 rounding of a sum of squares of 2,048 entries, 1e-6; the drift does not add up over 100 steps."""
    torch.manual_seed(0)
    start = torch.randn(3, 64, 32) * torch.tensor([1e-3, 1.0, 100.0])[:, None, None]
    walk = Walk(hyperball(lr), {"w": start})
    for _ in range(100):
        before = walk.params["w"]
        walk({"w": 1e-6 * torch.randn_like(start)})
        norms = walk.params["w"].norm(dim=(-2, -1)) / start.norm(dim=(-2, -1))
        assert norms == pytest.approx([1.0] * 3, abs=2e-6)
    chord = (walk.params["w"] - before).norm(dim=(-2, -1)) / start.norm(dim=(-2, -1))
    # A random direction is at right angles to within a few 1/√2048, so W turns by arctan(lr); rounded weights (6e-8)
    # are 6e-5 of the smallest chord.
    assert 2 * torch.arcsin(chord / 2) == pytest.approx([math.atan(lr)] * 3, rel=0.1)


def test_a_step_of_zero_changes_no_bit() -> None:
    start = torch.randn(2, 16, 8) + 0.3
    walk = Walk(hyperball(0.02), {"w": start})
    walk({"w": torch.zeros_like(start)})
    walk({"w": torch.randn_like(start)}, lr=0.0)
    assert torch.equal(walk.params["w"], start)


def test_a_step_that_leaves_nothing_to_normalize_is_bounded() -> None:
    w = torch.randn(1, 16, 8)
    updates = Walk(hyperball(1.0), {"w": w})({"w": 3 * w})  # W - 1 R Norm(W) = 0
    assert bool(torch.isfinite(updates["w"]).all()) and float(updates["w"].norm()) <= 2.1 * float(w.norm())


def facts() -> dict[str, BankInfo]:
    return {"spectral/4x4": BankInfo(tuple(Place(f"blocks.{i}.ada.weight", (4, 4), i) for i in range(3)))}


def test_a_matrix_that_starts_at_zero_trains_by_the_plain_step_and_is_named() -> None:
    start = torch.randn(3, 4, 4, dtype=torch.float64)
    start[1] = 0
    with pytest.warns(UserWarning, match=r"hyperball\(\): blocks\.1\.ada\.weight starts at norm zero") as caught:
        walk = Walk(bound(hyperball(0.1), facts()), {"spectral/4x4": start})
    assert len(caught) == 1
    total = torch.zeros(4, 4, dtype=torch.float64)
    for _ in range(3):
        g = torch.randn_like(start)
        walk({"spectral/4x4": g})
        total -= 0.1 * g[1]
    moved = walk.params["spectral/4x4"]
    torch.testing.assert_close(moved[1], total)
    norms, wanted = moved.norm(dim=(-2, -1)), start.norm(dim=(-2, -1))
    torch.testing.assert_close(norms[[0, 2]], wanted[[0, 2]])


def test_an_unbound_warning_names_the_place_and_tracing_reads_nothing() -> None:
    with pytest.warns(UserWarning, match=r"w\[0\], w\[1\] start at norm zero"):
        hyperball().init({"w": torch.zeros(2, 4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyperball().init({"w": torch.zeros(2, 4, 4, device="meta")})
        hyperball().init({"w": torch.randn(2, 4, 4)})


def test_laws() -> None:
    muon_h = chain(orthogonalize(matmul_dtype=torch.float32), hyperball())
    for dtype in (torch.float32, torch.float64):
        for transform in (hyperball(), muon_h):
            keeps_the_laws(transform, {"spectral/a": torch.randn(3, 8, 5, dtype=dtype)})
    a_bank_moves_as_its_members(hyperball)
    assert hyperball().roles == ("spectral",)
    assert nodes(hyperball(), {"w": torch.empty(4, 8, 5)}) == nodes(hyperball(), {"w": torch.empty(28, 8, 5)})
