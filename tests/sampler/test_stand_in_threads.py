"""Threads that call one sampler take turns: each gets the output of its own call."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tests.small_denoiser import make


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
