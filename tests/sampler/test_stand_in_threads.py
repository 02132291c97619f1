"""Threads that call one sampler take turns: each gets the output of its own call."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.small_denoiser import make


# Which thread comes when decides whether a request changes in the middle of a schedule.
@pytest.mark.filterwarnings("ignore:y changed in the middle of a schedule:UserWarning")
def test_threads_that_share_a_sampler_get_their_own_outputs() -> None:
    """Each thread has a request and timesteps of its own, so they would take rows and slots from each other."""
    sampler = make(4)
    calls: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for thread in range(3):
        y = torch.tensor([thread, 4 - thread])
        calls.append([(torch.randn(2, 4), torch.full((2,), 1.0 - 0.25 * i), y) for i in range(4)] * 8)
    with torch.no_grad():
        wanted = [[sampler.model(*call) for call in of_one] for of_one in calls]
    found: list[list[Tensor]] = [[] for _ in calls]
    begin = threading.Barrier(len(calls))

    def work(at: int) -> None:
        begin.wait()
        for call in calls[at]:
            found[at].append(sampler(*call))

    workers = [threading.Thread(target=work, args=(at,)) for at in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs)
        # A row is computed for one timestep, the model's for a batch: another order of the same sums.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_thread_that_releases_restores_and_prepares_waits_for_the_calls_of_others() -> None:
    """Weights without elements, or a schedule that is half computed, would be seen in the middle of a call."""
    sampler = make(4)
    x, y = torch.randn(2, 4), torch.tensor([1, 2])
    calls = [(x, torch.full((2,), 1.0 - 0.25 * i), y) for i in range(4)]
    with torch.no_grad():
        wanted = [sampler.model(*call) for call in calls]
    trajectory = sampler.sample(x, y)
    errors: list[BaseException] = []
    found: list[list[Tensor]] = []

    def until_it_fails(act: Callable[[], object]) -> Callable[[], None]:
        def work() -> None:
            try:
                for _ in range(6):
                    act()
            except BaseException as error:
                errors.append(error)

        return work

    def moved() -> None:
        sampler.release_weights("cpu")
        sampler.restore_weights()
        sampler.prepare((x, calls[0][1], y))

    def called() -> None:
        found.append([sampler(*call) for call in calls])

    def sampled() -> None:
        torch.testing.assert_close(sampler.sample(x, y), trajectory, rtol=1e-5, atol=1e-6)

    workers = [threading.Thread(target=until_it_fails(act)) for act in (moved, called, sampled)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == [] and len(found) == 6
    for outputs in found:
        torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-6)
