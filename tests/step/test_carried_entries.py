"""State that user code keeps, in a step's flat state and back."""

from __future__ import annotations

import types

import torch

from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._state import keys
from fusion_compile._step.carried import Carried
from fusion_compile._step.carried_entries import CarriedEntries


def test_what_lies_in_python_is_an_entry_and_comes_back_as_a_fresh_tensor() -> None:
    trainer = types.SimpleNamespace(mean=torch.zeros(2))
    carried = Carried(replaced={"trainer.mean": Slot(vars(trainer), "mean", "trainer.mean")})
    state: dict[str, torch.Tensor] = {}
    entries = CarriedEntries(carried, state)
    entries.take_all()
    key = keys.carried("trainer.mean")
    kept = state[key]
    assert kept is not trainer.mean and kept.tolist() == [0.0, 0.0]
    with carried.held({"trainer.mean": torch.ones(2)}):
        carried.now()
    kept.fill_(1.0)
    entries.give_back(carried.forms, {})
    first = trainer.mean
    assert first.tolist() == [1.0, 1.0] and first is not kept
    kept.fill_(2.0)
    entries.give_back(carried.forms, {})
    assert first.tolist() == [1.0, 1.0] and trainer.mean.tolist() == [2.0, 2.0]


def test_what_the_user_wrote_between_two_steps_counts() -> None:
    trainer = types.SimpleNamespace(mean=torch.zeros(2))
    carried = Carried(replaced={"trainer.mean": Slot(vars(trainer), "mean", "trainer.mean")})
    state: dict[str, torch.Tensor] = {}
    entries = CarriedEntries(carried, state)
    entries.take_all()
    kept = state[keys.carried("trainer.mean")]
    trainer.mean = torch.full((2,), 5.0)
    entries.take_over()
    assert state[keys.carried("trainer.mean")] is kept and kept.tolist() == [5.0, 5.0]


def test_a_step_that_carries_nothing_keeps_nothing() -> None:
    state: dict[str, torch.Tensor] = {}
    CarriedEntries(Carried(), state).give_back({}, {"carried/x": torch.ones(1)})
    assert state == {}
