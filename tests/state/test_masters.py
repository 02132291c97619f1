"""A master counts where the module holds its rounding, and the module's weight everywhere else."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._state.banks import build_layout
from fusion_compile._state.masters import adopt_written, rounded, with_written_weights
from fusion_compile._state.routing import route


def test_only_the_entry_that_was_written_is_adopted() -> None:
    master = torch.tensor([1.001, 2.003, -0.5])  # of which 1.001 and 2.003 have no bfloat16
    shown = master.to(torch.bfloat16)
    assert torch.equal(adopt_written(master, shown), master)
    shown[1] = 7.0
    assert torch.equal(adopt_written(master, shown), torch.tensor([1.001, 7.0, -0.5]))


def test_a_written_nan_is_adopted() -> None:
    shown = torch.tensor([torch.nan], dtype=torch.bfloat16)
    assert bool(adopt_written(torch.ones(1), shown).isnan())


def test_only_banks_with_a_module_entry_are_looked_at_and_the_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2).to(torch.bfloat16), nn.Linear(2, 2))
    layout = build_layout(model, route(model, ("scalar",)))
    half, full = (b.key for b in layout.banks)
    params = {f"params/{b.key}": torch.zeros(b.shape) for b in layout.banks}
    state = {**params, f"module/{half}": torch.ones(layout.banks[0].shape, dtype=torch.bfloat16)}
    adopted = with_written_weights(layout, state)
    assert bool((adopted[f"params/{half}"] == 1).all()) and bool((state[f"params/{half}"] == 0).all())
    assert adopted[f"params/{full}"] is state[f"params/{full}"]
    shown = rounded(layout, {half: torch.full((8,), 1.001), full: torch.zeros(8)}, state)
    assert set(shown) == {f"module/{half}"}
    assert shown[f"module/{half}"].dtype == torch.bfloat16 and float(shown[f"module/{half}"][0]) == 1.0
