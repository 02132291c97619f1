"""Counts and sums that run for ever: right after 10^6, 10^7 and 10^9 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fusion_compile import optim
from tests.small_models import PROGRAMS, batches, bits, compiled, differing, mlp


def annealed() -> optim.Transform:
    return optim.schedule_free(optim.adamw(1e-3), lr=1e-3, r=1.0, anneal=100)


COUNTS = {
    "taken/k": annealed,
    "step_count": lambda: optim.fusionopt_compat({"sf"}, lr=1e-3),
    "losses": lambda: optim.scale_lr_by_loss_ratio(optim.adamw(1e-3)),
    "gradients": lambda: optim.scale_lr_by_loss_ratio(optim.adamw(1e-3)),
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_does_not_stand_still_at_2_to_the_24(name: str) -> None:
    step = compiled(mlp(), optimizer=COUNTS[name](), mode="eager")
    first, *rest = batches(4)
    step(*first)
    (key,) = (k for k in step._state if k.endswith(name))
    for start in (2**24, 2**24 + 1, 10**9):
        step._state[key].fill_(start)
        for batch in rest:
            step(*batch)
        assert int(step._state[key]) == start + len(rest)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("n", [10**6, 2 * 10**7, 10**9])
@pytest.mark.covering("eager", "20000000-captured")
def test_the_average_goes_on_at_the_weight_of_one_in_n(n: int, program: str) -> None:
    """After n equal steps x moves by (z - x) / (n + 1), and the sum of weights by one weight."""
    rate = 1e-3
    step = compiled(mlp(), optimizer="sf_adamw", lr=optim.constant(rate), **PROGRAMS[program])
    first, *rest = batches(5)
    step(*first)
    weight = float(torch.tensor(rate)) ** 2
    total = step._state["optimizer/weight_sum"]
    total.fill_(weight * n)
    z = next(t for k, t in step._state.items() if k.startswith("optimizer/z/"))
    x = next(t for k, t in step._state.items() if k.startswith("params/"))
    z.add_(1.0 * n)  # so far away that the average's movement shows
    for i, batch in enumerate(rest, start=1):
        before = x.clone()
        step(*batch)
        # fp64 rounds the sum by 2^-53 n; fp32 would round it by 2^-24 n, six weights at 10^8.
        assert float(total) == pytest.approx(weight * (n + i), rel=1e-12)
        moved = (x - before).double() / (z - before).double()
        # One step of AdamW moves z by some 1e-3, of 1e6 and more; x - before is rounded at the size of x, about 4.
        torch.testing.assert_close(moved, torch.full_like(moved, 1 / (n + i)), rtol=1e-4, atol=5e-7 / n)


@pytest.mark.parametrize(("beta", "most"), [(0.9, 1e-6), (0.99, 1e-5), (0.999, 1e-4), (0.9999, 1e-3)])
def test_powers_of_beta_correct_rightly_for_ever(beta: float, most: float) -> None:
    """1 - βᵗ of the running product in fp32 against the exact one, at every t up to 10^6.

    The bound: at first βᵗ is near 1, where fp32 knows 1 - βᵗ to 2^-24 / (1 - β) only, in any way of computing it.
    """
    rounded = np.float32(beta)
    power = np.cumprod(np.full(10**6, rounded), dtype=np.float32)
    exact = -np.expm1(np.arange(1, 10**6 + 1) * np.log(np.float64(rounded)))
    assert np.abs((np.float32(1) - power) / exact - 1).max() < most
    assert power[-1] < 1e-35  # and from here to 10^9 nothing can be seen beside 1


def test_adam_after_a_billion_steps_is_uncorrected() -> None:
    """The powers have left the normal numbers, where a product with β may stand still; 1 - βᵗ is then exactly 1."""
    step = compiled(mlp(), mode="eager")
    first, second = batches(2)
    step(*first)
    for name in ("beta1_power", "beta2_power"):
        (key,) = (k for k in step._state if k.endswith(name))
        step._state[key].fill_(7e-43)
    (key,) = (k for k in step._state if "/mu/" in k)
    step(*second)
    mu = step._state[key]
    nu = step._state[key.replace("/mu/", "/nu/")]
    moved = torch.linalg.vector_norm(mu / (nu.sqrt() + 1e-8)) * float(step.metrics["lr"])
    # Decay moves the weights by lr · 0.01 of them, under a hundredth of Adam's move.
    assert float(step.metrics["update_norm"]) == pytest.approx(float(moved), rel=2e-2)


@pytest.mark.parametrize("name", ["annealed", "sf_adamw", "loss ratio"])
def test_a_checkpoint_whose_counts_are_floating_point_numbers_loads(name: str, tmp_path: Path) -> None:
    """As version 0.1 wrote them."""
    made: dict[str, Any] = {"annealed": annealed, "sf_adamw": "sf_adamw", "loss ratio": COUNTS["losses"]}
    step, resumed = (compiled(mlp(), optimizer=made[name], mode="eager") for _ in range(2))
    first, *rest = batches(4)
    step(*first)
    saved = step.state_dict()
    old = {n: t.float() if not t.ndim else t for n, t in saved["optimizer"].items()}
    assert any(t.dtype != saved["optimizer"][n].dtype for n, t in old.items())
    resumed.load_state_dict({**saved, "optimizer": old})
    found = resumed.state_dict()["optimizer"]
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in saved["optimizer"].items()}
    if name != "sf_adamw":  # whose sum was rounded to fp32
        for batch in rest:
            step(*batch)
            resumed(*batch)
        assert [n for n in differing(bits(step), bits(resumed)) if "weight_sum" not in n] == [] or name == "annealed"
