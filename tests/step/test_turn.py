"""A step is taken whole: signals wait for its end, what cannot wait leaves a mark, and threads wait for each other."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusion_compile as fc
from fusion_compile._step.turn import Turn, compiling
from tests.small_models import PROGRAMS, batches, bits, compiled, differing, mlp


def state() -> dict[str, Tensor]:
    return {"counts/step": torch.tensor(0)}


@pytest.fixture(autouse=True)
def _interrupts_are_heard() -> Iterator[None]:
    """As in a terminal: what runs in the background of a shell may ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_the_write() -> None:
    turn, written = Turn(state), []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), turn.writing():
        interrupt()
        written.append(1)
    assert written == [1] and signal.getsignal(signal.SIGINT) is handler
    turn.check()


def test_a_second_interrupt_does_not_wait_and_leaves_a_mark() -> None:
    turn, written = Turn(state), []
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), turn.writing():
        interrupt()
        interrupt()
        written.append(1)
    assert written == [] and signal.getsignal(signal.SIGINT) is handler
    for use in (turn.check, turn.writing().__enter__):
        with pytest.raises(RuntimeError, match=r"interrupted while it wrote .*Load a checkpoint .*to go on"):
            use()
    with turn.writing(everything=True):
        pass
    turn.check()


def test_a_signal_during_a_compile_does_not_wait_and_the_count_decides_what_it_left() -> None:
    seen = state()
    turn = Turn(lambda: seen)
    with pytest.raises(KeyboardInterrupt), turn.writing():
        compiling()
        interrupt()
    turn.check()  # nothing was written
    with pytest.raises(KeyboardInterrupt), turn.writing():
        compiling()
        seen["counts/step"] += 1
        interrupt()
    with pytest.raises(RuntimeError, match="interrupted while it wrote"):
        turn.check()


def test_an_ordinary_exception_comes_before_the_first_write() -> None:
    turn = Turn(state)
    with pytest.raises(ValueError, match="refused"), turn.writing():
        raise ValueError("refused")
    turn.check()


def test_writes_inside_of_writes_and_other_threads_leave_signals_alone() -> None:
    turn, seen = Turn(state), []

    def elsewhere() -> None:
        with Turn(state).writing():
            seen.append(signal.getsignal(signal.SIGINT))

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [handler]
    with turn.writing():
        putting_off = signal.getsignal(signal.SIGINT)
        with Turn(state).writing():
            assert signal.getsignal(signal.SIGINT) == putting_off
        assert signal.getsignal(signal.SIGINT) == putting_off != handler
    assert signal.getsignal(signal.SIGINT) is handler


# ---------------------------------------------------------------------- a training step


@pytest.fixture
def alarms() -> Iterator[Callable[[float], None]]:
    """``alarms(seconds)``: a KeyboardInterrupt so much later, as from a user; 0 calls it off."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, stop)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_interrupted_step_was_taken_whole_or_not_at_all(program: str, alarms: Callable[[float], None]) -> None:
    """At forty moments spread over the step: weights, moments and all counts belong to one number of steps."""
    step, reference = (compiled(mlp(), optimizer="sf_adamw", **PROGRAMS[program]) for _ in range(2))
    (batch,) = batches(1)
    for made in (step, reference):
        made(*batch)
        made(*batch)
    after = {2: bits(reference)}
    interrupted = 0
    for at in range(40):
        try:
            alarms(2e-5 * (at + 1))
            step(*batch)
            alarms(0)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            alarms(0)
        while max(after) < step.steps_called:
            reference(*batch)
            after[reference.steps_called] = bits(reference)
        assert differing(bits(step), after[step.steps_called]) == []
        assert torch.is_grad_enabled()
        step.state_dict()
    assert interrupted > 5  # or nothing was shown


def test_a_torn_state_is_neither_stepped_on_nor_saved_until_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = compiled(mlp(), mode="eager")
    first, second = batches(2)
    step(*first)
    step.save(tmp_path)
    real = step._programs.run

    def torn(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt  # as a second Ctrl-C does, or another thread

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(step._programs, "run", torn)
        step(*second)
    for use in (lambda: step(*second), lambda: step.save(tmp_path), step.state_dict):
        with pytest.raises(RuntimeError, match="a step was interrupted while it wrote its state"):
            use()
    step.load(tmp_path)
    step(*second)
    reference = compiled(mlp(), mode="eager")
    reference(*first)
    reference(*second)
    assert differing(bits(step), bits(reference)) == []


def test_a_handler_may_save(tmp_path: Path, alarms: Callable[[float], None]) -> None:
    """A cluster says that time is up: the handler saves, between two steps and never inside of one."""
    step = compiled(mlp(), optimizer="sf_adamw", mode="eager")
    (batch,) = batches(1)
    step(*batch)
    saved: list[int] = []

    def save(number: int, frame: Any) -> None:
        step.save(tmp_path)
        saved.append(step.steps_called)

    signal.signal(signal.SIGALRM, save)
    reference = compiled(mlp(), optimizer="sf_adamw", mode="eager")
    for at in range(10):
        alarms(3e-4 * (at + 1))
        while len(saved) <= at:
            step(*batch)
        resumed = compiled(mlp(), optimizer="sf_adamw", mode="eager")
        resumed.load(tmp_path)
        while reference.steps_called < saved[-1]:
            reference(*batch)
        assert differing(bits(resumed), bits(reference)) == []


def test_threads_that_read_beside_one_that_steps_see_whole_states() -> None:
    step = compiled(mlp(), optimizer="sf_adamw", mode="eager")
    reference = compiled(mlp(), optimizer="sf_adamw", mode="eager")
    (batch,) = batches(1)
    step(*batch)
    seen: dict[int, Any] = {}
    torn: list[int] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            found = step.state_dict()
            at = int(found["counts"]["step"])
            if at != found["steps_called"]:
                torn.append(at)
            seen[at] = found

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(150):
        step(*batch)
    stop.set()
    for thread in threads:
        thread.join()
    assert torn == [] and len(seen) > 2
    for _ in range(max(seen)):
        reference(*batch)
        if (found := seen.get(reference.steps_called)) is not None:
            wanted = reference.state_dict()
            for section in ("model", "optimizer"):
                assert all(torch.equal(t, wanted[section][n]) for n, t in found[section].items())


def test_two_threads_that_step_take_as_many_steps_as_they_were_asked_for() -> None:
    step = compiled(mlp(), mode="eager")
    reference = compiled(mlp(), mode="eager")
    (batch,) = batches(1)

    def work(step: fc.TrainingStep) -> None:
        for _ in range(25):
            step(*batch)

    threads = [threading.Thread(target=work, args=(step,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work(reference)
    work(reference)
    assert differing(bits(step), bits(reference)) == []
