"""The highest point of memory is known from what a compiler wrote, before it runs, and is what the allocator saw."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._program.kernel_sources import _compat as kernel_sources
from fusion_compile._program.memory._compat import Given, Written
from fusion_compile._program.memory.schedule import AliveThen, Schedule, highest, note, written_into
from fusion_compile._step import captures
from fusion_compile._step.proof import Compared

MIB = 2**20

BY_HAND = """
def call(args):
    x, w = args
    args.clear()
    assert_size_stride(x, (256, 1024), (1024, 1))
    buf0 = empty_strided_cpu((256, 1024), (1024, 1), torch.float32)
    extern_kernels.mm(x, w, out=buf0)
    buf1 = buf0; del buf0  # reuse
    cpp_fused_gelu_0(buf1)
    buf2 = empty_strided_cpu((512, 1024), (1024, 1), torch.float32)
    cpp_fused_cat_1(reinterpret_tensor(buf1, (1024, 256), (1, 1024), 0), buf2)
    del buf1
    buf3 = torch.sum(buf2, 1)
    buf4 = empty_strided_cpu((256, 1024), (1024, 1), torch.bfloat16)
    cpp_fused_2(buf2, buf4)
    return (buf4, buf3,)
"""


def by_hand() -> Written:
    names: dict[str, Any] = {}
    exec(BY_HAND, names)
    extern = type("extern_kernels", (), {"mm": torch.mm})
    given = tuple(Given(s, (s[1], 1), torch.float32, torch.device("cpu")) for s in ((256, 1024), (1024, 1024)))
    kernels = frozenset({"cpp_fused_gelu_0", "cpp_fused_cat_1", "cpp_fused_2"})
    return Written(names["call"].__code__, BY_HAND, kernels, {"torch": torch, "extern_kernels": extern}, given)


def test_memory_is_given_back_reused_and_counted_once() -> None:
    """At the top lie a result of 1 MiB, in whose place another was written, and one of 2 MiB."""
    peak = highest(by_hand())
    assert peak.bytes == 3 * MIB and peak.kernel == "cpp_fused_cat_1"
    assert peak.alive == (
        AliveThen("cpp_fused_cat_1", 2 * MIB, (512, 1024), "float32"),
        AliveThen("extern_kernels.mm", MIB, (256, 1024), "float32"),
    )


def test_a_schedule_knows_the_peak_of_one_program_alone() -> None:
    schedule, other = Schedule(), Schedule()
    note(by_hand())  # for nobody
    with written_into(schedule):
        note(by_hand())
        with written_into(other):
            assert other.peak() is None
    assert (found := schedule.peak()) is not None and found.bytes == 3 * MIB
    with written_into(schedule):
        note(by_hand())
    schedule.forget()
    assert schedule.peak() is None
    schedule.written += [by_hand(), by_hand()]
    assert schedule.peak() is None


def given_out(run: Callable[[], object], folder: Path) -> int:
    """The most bytes that torch's allocator had given out in a call, from the profiler's record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.parametrize("way", ["read", pytest.param("run", marks=pytest.mark.exhaustive)])
def test_a_step_of_inductor_takes_what_was_predicted(way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its kernels do nothing here: what is allocated does not depend on what they write."""
    monkeypatch.setattr(kernel_sources, "_compiled", lambda compiler, cache, kernels: [lambda *_: None] * len(kernels))
    monkeypatch.setattr(captures, "take_compared", lambda state, proof, run, *rest, **named: Compared(run()))
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    options: dict[str, Any] = {"capture": way, "rehearse": way == "run", "mode": "default", "optimizer": "adamw"}

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x).square().mean()
        return found

    with torch._inductor.config.patch(force_disable_caches=True):
        step = fc.compile_training_step(model, loss, **options)
        for _ in range(2):  # the second step may still be compared with an ordinary one
            step(x := torch.ones(256, 32))
    peak = step.programs[0].schedule.peak()
    assert peak is not None
    taken = given_out(lambda: step(x), tmp_path)
    assert taken >= 2 * 256 * 64 * 4, "two of the activations are there at once"
    assert peak.bytes == pytest.approx(taken, rel=0.01)  # the loss's copy is beside it


def test_another_compiler_writes_nothing_to_look_at() -> None:
    step = fc.compile_training_step(
        nn.Linear(4, 2), lambda model, x: model(x).square().mean(), backend="aot_eager", optimizer="adamw"
    )
    step(torch.randn(3, 4))
    assert step.programs[0].schedule.peak() is None
