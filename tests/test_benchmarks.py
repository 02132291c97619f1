"""The benchmarks' own arithmetic, and a dry run of the checks for a GPU: a check whose code fails says nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _measure  # type: ignore[import-not-found]

    yield _measure


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _rows  # type: ignore[import-not-found]

    yield _rows


def test_contenders_take_turns_after_their_warm_up(measure: ModuleType) -> None:
    order: list[str] = []
    contenders = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure.interleaved(contenders, torch.device("cpu"), rounds=2, calls=2, warmup=1)
    assert "".join(order) == "ab" + "aabb" * 2
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_of_the_rounds_ratios(measure: ModuleType) -> None:
    """A round that was slow for both changes nothing."""
    timings = measure.compare({"reference": [1.0, 10.0, 1.0], "other": [2.0, 20.0, 2.2]}, "reference")
    assert timings["other"].ratio == pytest.approx(2.0)
    assert timings["other"].ms == pytest.approx(2.2)
    assert timings["reference"].ratio == 1


def test_the_highest_point_of_a_call_counts_what_lives_at_the_same_time(measure: ModuleType) -> None:
    kept = torch.ones(1000)

    def call() -> None:
        first = torch.ones(2000)
        del first
        second, third = torch.ones(500), torch.ones(1000)
        del second, third

    assert measure.peak_of_call(call, torch.device("cpu"), lambda: [kept, kept[:10]]) == 4 * (1000 + 2000)


def test_a_check_that_fails_is_a_row_and_the_next_one_runs(rows: ModuleType) -> None:
    seen: list[Any] = []
    group = rows.Rows("group", time.monotonic() + 60, False, seen.append)

    def raises(c: Any) -> None:
        raise RuntimeError("of\nsome kind")

    group.check("raises", raises)
    group.check("disagrees", lambda c: c.require(False, "not so"))
    group.check("holds", lambda c: c.note("seen", number=3))
    group.check("needs a GPU", lambda c: c.require_on_gpu(False, "never said on a CPU"))
    assert [(row.verdict, row.detail) for row in seen] == [
        (rows.FAILED, "RuntimeError: of some kind"),
        (rows.FAILED, "not so"),
        (rows.OK, "seen"),
        (rows.UNVERIFIED, ""),
    ]
    assert "raises" in seen[0].trace and seen[2].numbers == {"number": 3}


def test_a_check_is_stopped_at_its_time_and_none_begins_after_it(rows: ModuleType) -> None:
    seen: list[Any] = []
    group = rows.Rows("group", time.monotonic() + 0.2, True, seen.append, grace=0.1)
    group.check("hangs", lambda c: time.sleep(30))
    group.check("comes late", lambda c: None)
    assert [(row.check, row.verdict) for row in seen] == [("hangs", rows.FAILED), ("comes late", rows.NOT_RUN)]
    assert "TimeoutError" in seen[0].detail and seen[1].detail == "time"


def dry_run(out: Path, *arguments: str) -> tuple[int, list[dict[str, str]]]:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--dry-run", *arguments]
    done = subprocess.run(command, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True)
    written = json.loads((out / "gpu_check.json").read_text())
    assert "what was seen" in done.stdout, done.stderr
    return done.returncode, written["rows"]


@pytest.mark.exhaustive
def test_every_check_for_the_gpu_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    """All kinds of groups; of the recipes one of each kind, as the others' code is the same."""
    groups = (
        "detectors,recipe-adamw,recipe-sf_normuon,noise,facade,sampler,modes-sampler,train-speed,sampler-speed,"
        "autotune-muon"
    )
    code, rows = dry_run(tmp_path, "--in-process", "--only", groups)
    failed = [row for row in rows if row["verdict"] not in ("ok", "unverified on a GPU")]
    assert not failed, failed
    assert code == 0
    assert {row["group"] for row in rows} == set(groups.split(","))


def test_a_group_that_cannot_begin_is_a_failed_row(tmp_path: Path) -> None:
    """A process of its own, as on a GPU; here there is none, and without --dry-run that is what the row says."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--only", "detectors"]
    done = subprocess.run(command, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    (row,) = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert row["verdict"] == "FAILED" and "no GPU" in row["detail"]


@pytest.fixture
def peer_launches(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import _peer_launches  # type: ignore[import-not-found]

    module: ModuleType = _peer_launches
    return module


def test_launches_of_a_fused_optimizer_follow_torchs_chunks(peer_launches: ModuleType) -> None:
    launches = peer_launches.chunked_launches
    assert launches([10] * 36, 36, 320) == 1 and launches([10] * 37, 36, 320) == 2
    assert launches([65536 * 320], 36, 320) == 1 and launches([65536 * 320 + 1], 36, 320) == 2
    # A tensor that goes on in the next launch counts there, too.
    assert launches([65536 * 321, *[10] * 36], 36, 320) == 3
    assert launches([0, 0], 36, 320) == 0


def test_operators_of_a_loss_count_and_views_do_not(peer_launches: ModuleType) -> None:
    def loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(x), x.flip(0)[None][0].detach() * 2)

    found = peer_launches.loss_launches(loss, (torch.ones(4, 8),))
    forward = [launch.name for launch in found if launch.region == "forward"]
    assert forward == ["flip", "mul", "mse_loss", "mse_loss"]
    assert found[1].moved == 2 * 4 * 8 * 4
    assert any("backward" in launch.name for launch in found if launch.region == "backward")
