"""What a step of data parallelism costs: bytes that travel, and Newton-Schulz, once or on every rank.

Sums and no measurements: nothing overlaps, a ring moves bytes at one rate, and starting a message costs nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from fusion_compile._scaling.models import Model

ITERATIONS = 5
"""Of Newton-Schulz."""


class Machine(NamedTuple):
    """`gpus` ranks. `bandwidth`: GB/s in each direction that one has to the others. `tflops`: that products reach."""

    gpus: int
    bandwidth: float
    tflops: float


class Cost(NamedTuple):
    """Milliseconds of one step, on the rank that needs most.

    `compute`: forward and backward. `all_reduce`: gradients, replicated weights. `divided`: gradients to owners and new
    weights back (ZeRO-1). `sharded`: weights gathered twice, gradients to owners (full). `rows`: gradients of row
    shards to owners of whole matrices, and the update back (FSDP2's parts). `everywhere`, `owned`: Newton-Schulz of
    all matrices, and of those that the busiest rank owns. `even`: what it would own if matrices could be cut.
    """

    compute: float
    all_reduce: float
    divided: float
    sharded: float
    rows: float
    everywhere: float
    owned: float
    even: float


class Memory(NamedTuple):
    """GB a rank for weights, gradients and the optimizer's state; activations come on top."""

    replicate: float
    optimizer: float
    full: float


def newton_schulz(matrix: tuple[int, int]) -> float:
    """Operations of Newton-Schulz on one matrix: on the Gram matrix of the short side s, 4 l s² + 2 s³ each time."""
    short, long = sorted(matrix)
    return float(ITERATIONS * (4 * long * short**2 + 2 * short**3))


def samples_worth(model: Model) -> float:
    """Newton-Schulz of the whole model in training samples, of 6 operations a parameter and token."""
    return sum(map(newton_schulz, model.matrices)) / (6.0 * model.entries * model.tokens)


def busiest(costs: Sequence[float], ranks: int) -> float:
    """The most that one rank has to do if the dearest go first, each to the rank that has least."""
    load = [0.0] * min(ranks, len(costs))
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(load, load[0] + cost)
    return max(load)


def cost(model: Model, machine: Machine, *, batch: int, gradient_bytes: int = 4, weight_bytes: int = 2) -> Cost:
    """What a step costs. `batch`: samples a rank. `gradient_bytes`, `weight_bytes`: of an entry that travels."""
    w, entries = machine.gpus, model.entries
    share, per_ms = (w - 1) / w, machine.bandwidth * 1e6
    flops_per_ms = machine.tflops * 1e9
    work = [newton_schulz(m) for m in model.matrices]
    return Cost(
        compute=6.0 * entries * model.tokens * batch / flops_per_ms,
        all_reduce=2 * entries * gradient_bytes * share / per_ms,
        divided=entries * (gradient_bytes + weight_bytes) * share / per_ms,
        sharded=entries * (gradient_bytes + 2 * weight_bytes) * share / per_ms,
        rows=2 * entries / w * gradient_bytes * share / per_ms,
        everywhere=sum(work) / flops_per_ms,
        owned=busiest(work, w) / flops_per_ms,
        even=max(sum(work) / w, sum(work) / len(work)) / flops_per_ms,
    )


def memory(model: Model, gpus: int) -> Memory:
    """With fp32 masters and two more fp32 tensors (SF-NorMuon), bf16 weights and fp32 gradients: 18 bytes an entry."""
    gb, state, module, gradients = model.entries / 1e9, 12, 2, 4
    return Memory(
        (state + module + gradients) * gb,
        (module + gradients) * gb + state * gb / gpus,
        (state + module + gradients) * gb / gpus,
    )


def share_when_owned(share: float, ranks: int) -> float:
    """The optimizer's share of a step when `ranks` divide what took the `share` of a step on one."""
    return share / ranks / (1 - share + share / ranks)
