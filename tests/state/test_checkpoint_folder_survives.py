"""No moment at which `save` dies can lose the older checkpoint or leave half of a newer one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor

import fusion_compile as fc
from fusion_compile._state import checkpoint_folder
from tests.small_models import batches, bits, compiled, differing, mlp


def test_a_newer_checkpoint_replaces_the_older_and_nothing_else(tmp_path: Path) -> None:
    strangers = ["model-00001-of-00002.safetensors", "model-card.md", "state-of-the-art.txt", "checkpoint.json.bak"]
    step = compiled(mlp(), mode="eager")
    for batch in batches(3):
        step(*batch)
        step.save(tmp_path)
        for name in strangers:
            (tmp_path / name).write_text("mine")
    index = json.loads((tmp_path / "checkpoint.json").read_text())
    ours = {"checkpoint.json", *index["files"].values()}
    assert {p.name for p in tmp_path.iterdir()} == ours | set(strangers)
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert differing(bits(step), bits(fresh)) == []


class Power(BaseException):
    """The power goes: nothing after this line of `save` happens, not even an ``except Exception``."""


CALLS: dict[str, tuple[Any, str]] = {
    "mkdir": (Path, "mkdir"),
    "save_file": (checkpoint_folder, "save_file"),
    "open": (checkpoint_folder, "open"),
    "fsync": (os, "fsync"),
    "json.dump": (json, "dump"),
    "replace": (os, "replace"),
    "os.open": (os, "open"),
    "iterdir": (Path, "iterdir"),
    "unlink": (Path, "unlink"),
}


def _half_written(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path)
    os.truncate(path, os.path.getsize(path) // 2)


def _saved_states(tmp_path: Path) -> tuple[fc.TrainingStep, dict[str, bytes]]:
    """A step one step ahead of the checkpoint in `tmp_path`, and the bits of that checkpoint."""
    step = compiled(mlp(), mode="eager")
    first, second = batches(2)
    step(*first)
    step.save(tmp_path)
    before = bits(step)
    step(*second)
    return step, before


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", CALLS)
def test_dying_at_any_call_of_save_leaves_the_old_checkpoint_or_the_new(
    call: str, late: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first such call, at the second, and so on until save needs no further one; before or after it acts."""
    owner, name = CALLS[call]
    step, old = _saved_states(tmp_path)
    new = bits(step)
    real = getattr(owner, name, open)  # `open` is a builtin, and is put where save looks first
    died = 0
    for fatal in range(1, 20):
        calls = [0]

        def faulty(*args: Any, calls: list[int] = calls, fatal: int = fatal, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == fatal:
                if late:
                    done = real(*args, **kwargs)
                    if name == "open" and hasattr(done, "close"):
                        done.close()  # as the end of a process does
                elif name == "save_file":
                    _half_written(*args, **kwargs)
                raise Power
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, faulty, raising=False)
            try:
                step.save(tmp_path)
            except Power:
                died += 1
        fresh = compiled(mlp(), mode="eager")
        fresh.load(tmp_path)
        assert differing(bits(fresh), old) == [] or differing(bits(fresh), new) == []
        if calls[0] < fatal:
            break
    assert died >= 1  # or the call is none that save makes, and this test shows nothing
    assert differing(bits(fresh), new) == []  # the last save was left in peace
    assert len(list(tmp_path.iterdir())) == 3  # and it cleared away what the dead ones left


def test_the_new_checkpoint_begins_with_the_renaming_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is on disk before; a machine that loses power right after has no index to unwritten tensors."""
    events: list[str] = []

    def record(owner: Any, name: str, describe: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            events.append(describe(*args))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, recorded)

    record(os, "fsync", lambda descriptor: f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{descriptor}'))}")
    record(os, "replace", lambda source, target: f"rename to {os.path.basename(target)}")
    record(checkpoint_folder, "save_file", lambda tensors, path: f"write {os.path.basename(path)}")
    compiled(mlp(), mode="eager").save(tmp_path)
    said = [e.split("-")[0].removesuffix(".safetensors") for e in events]
    renamed = said.index("rename to checkpoint.json")
    assert said[:4] == ["write model", "sync model", "write state", "sync state"]
    assert any(e.startswith("sync checkpoint.json.") for e in events[:renamed])
    assert events[renamed + 1] == f"sync {tmp_path.name}"


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import torch
from tests.small_models import batches, compiled, mlp
from fusion_compile._state import checkpoint_folder

step = compiled(mlp(), mode="eager")
step(*batches(1)[0])
step.save({folder!r})
step(*batches(2)[1])
real, calls = {owner}.{name}, 0

def fatal(*args, **kwargs):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

{owner}.{name} = fatal
step.save({folder!r})
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal.")
def test_a_killed_process_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    """The real thing, at four points of save, one process each (at once, as starting torch is what takes the time)."""
    root = str(Path(__file__).parents[2])
    points = [
        ("checkpoint_folder", "save_file", 2),
        ("os", "fsync", 3),
        ("os", "replace", 1),
        ("checkpoint_folder", "_sync_folder", 1),
    ]
    children = []
    for i, (owner, name, at) in enumerate(points):
        script = KILLED.format(root=root, folder=str(tmp_path / str(i)), owner=owner, name=name, at=at)
        children.append(subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True))
    taken = []
    for i, child in enumerate(children):
        _, said = child.communicate(timeout=120)
        assert child.returncode == -signal.SIGKILL, said
        step = compiled(mlp(), mode="eager")
        step.load(tmp_path / str(i))
        taken.append(int(step.state_dict()["counts"]["step"]))
        step.save(tmp_path / str(i))
        assert len(list((tmp_path / str(i)).iterdir())) == 3
    assert taken == [1, 1, 1, 2]  # until the index is renamed it is the old one
