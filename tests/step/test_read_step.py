"""A step captured by reading: compiled by its first call, refused where Dynamo cannot read."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.watch.late_hooks import LateHooks
from fusion_compile._capture.watch.reads import reading
from fusion_compile._capture.watch.watch import Watch
from fusion_compile._program.programs import Programs
from fusion_compile._step.methods import Methods
from fusion_compile._step.read_step import NotRead, ReadStep


def doubling(form: Any) -> Any:
    return lambda state, batch: {"w": state["w"] * batch[0]}


def step_of(programs: Programs, pure: Any, state: dict[str, Tensor]) -> ReadStep:
    return ReadStep(programs, "key", pure, False, (state, (torch.full((2,), 2.0),)), "default")


def test_the_first_step_is_taken_while_it_is_compiled() -> None:
    programs, state = Programs("aot_eager"), {"w": torch.ones(2)}
    step = step_of(programs, doubling, state)
    assert state["w"].tolist() == [2.0, 2.0] and len(programs) == 1 and step.fits(state, ()) and step.forms == {}
    assert step(state, (torch.full((2,), 3.0),)) == {}
    assert state["w"].tolist() == [6.0, 6.0]
    step.forget()
    assert len(programs) == 0 and programs.captured == {}


def test_what_dynamo_cannot_read_is_not_read_and_not_run() -> None:
    import _thread

    lock, programs, state = _thread.allocate_lock(), Programs("aot_eager"), {"w": torch.ones(2)}

    def pure(form: Any) -> Any:
        def advance(state: dict[str, Tensor], batch: tuple[Any, ...]) -> dict[str, Tensor]:
            lock.acquire(False)
            return {"w": state["w"] * 2}

        return advance

    with pytest.raises(NotRead, match="cannot be captured as one graph"):
        step_of(programs, pure, state)
    assert state["w"].tolist() == [1.0, 1.0] and len(programs) == 0


def test_a_replaced_method_is_refused_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    state = {"w": torch.ones(2)}
    step = step_of(Programs("aot_eager"), doubling, state)
    step.watch(Methods([], Own()), LateHooks({}))
    monkeypatch.setattr(Own, "forward", lambda self, x: -x)
    with pytest.raises(RuntimeError, match=r"Own.forward was replaced"):
        step(state, (torch.full((2,), 3.0),))
    assert state["w"].tolist() == [2.0, 2.0]


def test_what_a_guard_misses_is_named_with_its_old_and_new_value() -> None:
    settings, weights = types.SimpleNamespace(scale=2.0, seen=0), types.SimpleNamespace(of=torch.ones(2))

    def pure(form: Any) -> Any:
        return lambda state, batch: {"w": state["w"] * settings.scale * weights.of}

    state, batch = {"w": torch.ones(2)}, (torch.ones(2),)
    with reading() as reads:
        pure(None)(state, batch)
    roots = {"loss_fn": pure}
    step = ReadStep(Programs("aot_eager"), "key", pure, False, (state, batch), "default")
    step.watch(Methods([], nn.Identity()), LateHooks({}), Watch(roots, reads, frozen=()))
    settings.seen, settings.scale = 1, 3.0
    said = r"settings.scale was 2.0 when .* is 3.0 now\. If it should change .* otherwise call `step.recapture\(\)`"
    with pytest.raises(RuntimeError, match=said):
        step(state, batch)
    settings.scale, weights.of = 2.0, torch.ones(2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"weights.of was a tensor \(2,\) of torch.float32 on cpu .* torch.float64"):
        step(state, batch)
    weights.of = torch.ones(2)
    step(state, batch)
    assert state["w"].tolist() == [4.0, 4.0]
