"""What a copied or pickled optimizer takes along; without averages, as before there were any."""

from __future__ import annotations

import pickle

from torch import nn

import fusion_compile as fc
from fusion_compile._torch_optim.portable import portable, restored, with_averages
from fusion_compile.optim import adamw


def test_numbers_names_and_averages_come_back() -> None:
    model = nn.Linear(3, 2)
    ema = fc.EMA(model, 0.9)
    optimizer = fc.optim.as_torch_optimizer(model, "adamw", lr=0.5, ema=ema, mode="eager")
    inside = optimizer._inside
    back = restored({**pickle.loads(pickle.dumps(portable(inside))), "routes": ()})
    assert back.numbers == inside.numbers and back.records[0].names == ["weight", "bias"]
    assert back.averages[0].average == ema.average and "ema_rate" in back.transform.hyperparameters


def test_one_that_was_pickled_before_there_were_averages_has_none() -> None:
    optimizer = fc.optim.as_torch_optimizer(nn.Linear(3, 2), "adamw", mode="eager")
    kept = portable(optimizer._inside)
    back = restored({**kept, "inside": kept["inside"][:-2], "routes": ()})
    assert back.averages == () and back.half_precision == "master"


def test_a_transform_without_averages_is_itself() -> None:
    base = adamw(1e-3)
    assert with_averages(base, ()) is base
    assert "ema_rate" in with_averages(base, [fc.EMA(decay=0.9)]).hyperparameters
