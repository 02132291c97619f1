"""How every benchmark here measures: contenders by turns in one process, medians, the machine told, a table, JSON.

A ratio is the median over rounds of (contender / reference in the same round), so that a machine that slows down half
way slows both. Warm-up, and with it compilation, stays outside.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Timing:
    """`ms`: median milliseconds of one call. `ratio`: to the reference, the median of the rounds'. `spread`: of `ms`,
    the interquartile range over the median."""

    ms: float
    ratio: float
    spread: float


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    calls: int = 1,
    warmup: int = 3,
    before: Mapping[str, Callable[[], object]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of one call of each contender in every round, all contenders by turns.

    A round times `calls` calls in a row, on a GPU between two events, so that the host may run ahead as it does in
    training. The `warmup` calls of each contender come first and are not timed, nor are those of `before`, which come
    before what is timed. `clock`: in seconds; on a machine that does other work ``time.process_time``, with one thread.
    """
    preparations = before or {}
    for name, run in contenders.items():
        for _ in range(warmup):
            preparations.get(name, _nothing)()
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            preparations.get(name, _nothing)()
            times[name].append(_time(run, calls, device, clock) / calls)
    return times


def _nothing() -> None:
    pass


def _time(run: Callable[[], object], calls: int, device: torch.device, clock: Callable[[], float]) -> float:
    wait(device)
    if device.type == "cuda":
        started, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record()
        for _ in range(calls):
            run()
        ended.record()
        ended.synchronize()
        return float(started.elapsed_time(ended))
    begin = clock()
    for _ in range(calls):
        run()
    return 1e3 * (clock() - begin)


def compare(times: Mapping[str, Sequence[float]], reference: str) -> dict[str, Timing]:
    """The `Timing` of every contender of `interleaved`."""
    out = {}
    for name, values in times.items():
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
        middle = statistics.median(values)
        ratio = statistics.median(v / r for v, r in zip(values, times[reference], strict=True))
        out[name] = Timing(middle, ratio, (high - low) / middle)
    return out


def machine(device: torch.device) -> dict[str, str]:
    """What a number means nothing without: date, versions, processor, load; GPU and driver where there is one."""
    facts = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu cores, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), "driver": _driver()}
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            facts["triton"] = "none"
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _driver() -> str:
    if (tool := shutil.which("nvidia-smi")) is None:
        return "unknown"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def peak_of_call(run: Callable[[], object], device: torch.device, kept: Callable[[], Iterable[Tensor]]) -> int:
    """Bytes at the highest point of one call on a CPU: what is `kept` between calls, and the most that torch's
    allocator gave out in the call beyond it, from the profiler's record of every allocation.

    What a library allocates behind torch's back (oneDNN's scratch) is not in it, for any contender.
    """
    if device.type != "cpu":
        raise ValueError(
            "on a GPU use torch.cuda.max_memory_allocated(): a replayed graph allocates nothing to record."
        )
    run()
    with tempfile.TemporaryDirectory() as folder:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            run()
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    given_out = itertools.accumulate(change for _, change in sorted(changes, key=lambda c: c[0]))
    return tensor_bytes(kept()) + max([0, *given_out])


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind `tensors`, what several share counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as need be: the first to the left, the others to the right."""
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print(f"\n{title}")
    for line in lines:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def print_timings(title: str, timings: Mapping[str, Timing]) -> None:
    """The table of `compare`."""
    rows = [(name, f"{t.ms:.2f}", f"{t.ratio:.2f}", f"{t.spread:.0%}") for name, t in timings.items()]
    print_table(title, ("", "ms", "ratio", "spread"), rows)


def print_machine(facts: Mapping[str, str]) -> None:
    print(", ".join(f"{name} {value}" for name, value in facts.items()), flush=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
