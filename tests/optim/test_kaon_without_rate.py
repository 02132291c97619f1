"""KProdigy and Autokaon: the source's trajectory, what it gets wrong, and the estimates that users read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fusion_compile import optim
from fusion_compile.optim import kaon
from tests.data.bowl import SHAPES, UPDATES, Bowl, loss_fn, noise, start_of, trace
from tests.data.families import FamilyCase
from tests.optim.walks import Walk
from tests.small_models import batches, compiled, mlp, squared_error

EAGER: dict[str, Any] = {"mode": "eager"}


def follow(updates: tuple[int, ...]) -> None:
    """Within the README's bound, and what rounding the weights to fp32 changes; d to 1e-6."""
    case, model = FamilyCase("kaon_kprodigy_fp32_nogc_full"), Bowl()
    start = start_of(model)
    optimizer = kaon.KProdigy(model.parameters(), **case.meta["constructor"], **EAGER)
    for update in range(1, max(updates) + 1):
        optimizer.zero_grad()
        loss_fn(model, *noise(update - 1)).backward()
        optimizer.step()
        if update not in updates:
            continue
        found = trace({n: p.detach().clone() for n, p in model.named_parameters()}, start)
        for n in SHAPES:
            norm, moved = case._traces[f"{case.name}/{update}/y/{n}"][256:]
            bound = case.bound(update, "y", n) + 2**-24 * update**0.5 * norm / moved
            assert case.error(update, "y", n, found[n]) <= bound, (update, n, case.error(update, "y", n, found[n]))
        assert optimizer.get_d() == pytest.approx(case.d(update), rel=1e-6), update


def test_kprodigy_follows_the_source() -> None:
    follow((1, 2, 5, 20))


@pytest.mark.exhaustive
def test_kprodigy_follows_the_source_to_the_end() -> None:
    follow(UPDATES)


@pytest.mark.parametrize("second_moment", ["full", "factored"])
def test_kprodigy_without_momentum_trains_and_its_first_step_is_d0(second_moment: str) -> None:
    """The source multiplies the raw gradient by one d too few there: its first step is 1 / d0 too long, and d stays."""
    model = mlp()
    start = [p.detach().clone() for p in model.parameters()]
    options: dict[str, Any] = {"betas": (0.0, 0.999), "gradient_centralization": False, "d_coef": 10.0}
    optimizer = kaon.KProdigy(model.parameters(), second_moment=second_moment, **options, **EAGER)
    losses = []
    for step, (x, y) in enumerate(batches(8) * 8):
        optimizer.zero_grad()
        loss = squared_error(model, x, y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step == 0:
            moved = max(float((p - s).detach().abs().max()) for p, s in zip(model.parameters(), start, strict=True))
            assert moved < 1e-3
    assert optimizer.get_d() > 1e-4 and losses[-1] < 0.95 * losses[7], "of one batch"


def test_a_factored_second_moment_is_the_same_for_a_gradient_of_rank_one_and_takes_few_bytes() -> None:
    """Where g² is a row times a column, the factored moment is the full one; after one step d is d0 in both."""
    rank_one = {"w": torch.outer(torch.rand(6) + 0.1, torch.rand(5) + 0.1).double()}
    moves = {}
    for kind in ("fp32", "factored"):
        walk = Walk(optim.prodigy(second_moment=kind), {"w": torch.zeros(6, 5, dtype=torch.float64)})
        moves[kind] = walk(rank_one)["w"]
        assert (walk.state.nu == {}) is (kind == "factored")
    torch.testing.assert_close(moves["factored"], moves["fp32"], rtol=1e-5, atol=0)
    model = nn.Linear(256, 256, bias=False)
    whole = optim.prodigy(slice_p=11, momentum="4bit", second_moment="factored")
    step = compiled(model, squared_error, optimizer=whole, mode="eager")
    held = sum(t.nbytes for key, t in step._state.items() if key.startswith("optimizer/")) / 65536
    assert held <= 1.758, "the study's table: 1.758 with int8 for the source"


def test_autokaon_freezes_and_says_its_scale() -> None:
    model = mlp()
    optimizer = kaon.Autokaon(model.parameters(), lr_freeze=2, **EAGER)
    assert optimizer.get_d() == 0.0
    scales = []
    for x, y in batches(5):
        optimizer.zero_grad()
        squared_error(model, x, y).backward()
        optimizer.step()
        scales.append(optimizer.get_d())
    assert scales[0] > 0 and len(set(scales[2:])) == 1
    with pytest.raises(ValueError, match="give s_init, too"):
        kaon.Autokaon(model.parameters(), scale_cap=1e-3)
    with pytest.raises(ValueError, match="each has its own d"):
        kaon.KProdigy([{"params": [p]} for p in mlp().parameters()], independent_d=False)
