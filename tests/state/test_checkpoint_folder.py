"""The folder of a checkpoint: what is written where, what is refused, and savers and readers that meet in one."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fusion_compile as fc
from fusion_compile._state import checkpoint_folder, checksums
from tests.refusals import refused, works
from tests.small_models import batches, bits, compiled, differing, mlp


def trained(steps: int = 1) -> fc.TrainingStep:
    step = compiled(mlp(), mode="eager")
    for batch in batches(steps):
        step(*batch)
    return step


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write `index` as `save` would: with the checksum that belongs to it."""
    (folder / "checkpoint.json").write_text(json.dumps({**index, "checksum": checksums.of_index(index)}))


def as_of_version_01(folder: Path) -> None:
    """Take out of the index what version 0.1 did not write."""
    old = {k: v for k, v in index_of(folder).items() if k not in ("checksums", "checksum")}
    (folder / "checkpoint.json").write_text(json.dumps(old))


# ---------------------------------------------------------------------- a flipped bit


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x40
    file.write_bytes(data)


@pytest.mark.parametrize("kind", ["model", "state"])
@pytest.mark.parametrize("from_the_end", [1, 30, 101])
def test_a_flipped_bit_in_a_tensor_is_named_and_loads_nothing(kind: str, from_the_end: int, tmp_path: Path) -> None:
    trained().save(tmp_path)
    flip(tmp_path / index_of(tmp_path)["files"][kind], -from_the_end)
    step = compiled(mlp(), mode="eager")
    with refused(step, ValueError, f"{tmp_path} is damaged: in {kind}-1-", "has the checksum", "with verify=False"):
        step.load(tmp_path)
    assert works(step)


def test_without_verification_it_is_loaded_as_it_is(tmp_path: Path) -> None:
    trained().save(tmp_path)
    flip(tmp_path / index_of(tmp_path)["files"]["model"], -1)
    step = compiled(mlp(), mode="eager")
    step.load(tmp_path, verify=False)
    assert int(step.metrics["step"]) == 1


def test_a_number_that_was_changed_in_the_index_is_noticed(tmp_path: Path) -> None:
    trained().save(tmp_path)
    index = index_of(tmp_path)
    index["hyperparameters"]["lr"] = 0.5
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    step = compiled(mlp(), mode="eager")
    with refused(step, ValueError, "checkpoint.json is not as it was written", "load it with verify=False"):
        step.load(tmp_path)
    step.load(tmp_path, verify=False)
    assert step.hyperparameters["lr"] == 0.5


@pytest.mark.parametrize("key", ["checksum", "checksums"])
def test_a_flipped_bit_in_the_name_of_the_checksums_is_noticed(tmp_path: Path, key: str) -> None:
    trained().save(tmp_path)
    file = tmp_path / "checkpoint.json"
    flip(file, file.read_bytes().index(f'"{key}"'.encode()) + 1)
    step = compiled(mlp(), mode="eager")
    with refused(step, ValueError, "checkpoint.json is not as it was written"):
        step.load(tmp_path)


def test_every_flipped_bit_of_the_index_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """All 8 bits of every third byte. An exponent's ``e`` may be an ``E``: the index reads as it was written."""
    trained().save(tmp_path)
    file, written = tmp_path / "checkpoint.json", index_of(tmp_path)
    good, same = file.read_bytes(), []
    for at in range(0, len(good), 3):
        for bit in range(8):
            damaged = bytearray(good)
            damaged[at] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                found = checkpoint_folder._read_index(tmp_path, verify=True)
            except ValueError:
                continue
            assert found == written
            same.append(chr(good[at]))
    assert len(good) > 1000 and set(same) <= {"e"}


def test_a_checkpoint_of_version_01_has_no_checksums_and_loads(tmp_path: Path) -> None:
    step = trained(2)
    step.save(tmp_path)
    as_of_version_01(tmp_path)
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert differing(bits(step), bits(fresh)) == []


def test_a_warm_start_looks_at_the_checksums_too(tmp_path: Path) -> None:
    trained().save(tmp_path)
    flip(tmp_path / index_of(tmp_path)["files"]["model"], -1)
    step = compiled(mlp(), optimizer="lion", mode="eager")
    with refused(step, ValueError, "is damaged: in model-1-"):
        step.warm_start(tmp_path)


# ---------------------------------------------------------------------- an index that is not what save writes


def _two_checkpoints(folder: Path) -> None:
    first = index_of(folder)
    kept = {name: (folder / name).read_bytes() for name in first["files"].values()}
    trained(2).save(folder)
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    write_index(folder, {**index_of(folder), "files": {**index_of(folder)["files"], "model": first["files"]["model"]}})


def _elsewhere(folder: Path) -> None:
    other = folder.parent / "elsewhere"
    other.mkdir()
    name = index_of(folder)["files"]["model"]
    (folder / name).rename(other / name)
    write_index(folder, {**index_of(folder), "files": {**index_of(folder)["files"], "model": f"../elsewhere/{name}"}})


def _indexed(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, {**index_of(folder), **changes})


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "files of two checkpoints": (_two_checkpoints, "names files of two checkpoints, model-1-"),
    "a path that leaves the folder": (_elsewhere, "names '../elsewhere/model-1-"),
    "no text": (lambda f: (f / "checkpoint.json").write_bytes(b"\xff\xfe{"), "checkpoint.json is no JSON"),
    "too deep": (lambda f: (f / "checkpoint.json").write_text("[" * 10**5), "checkpoint.json is no JSON"),
    "files that are no names": (_indexed(files=[1, 2]), "names None as the file of the model"),
    "one name twice": (
        lambda f: _indexed(files=dict.fromkeys(("model", "state"), index_of(f)["files"]["model"]))(f),
        "as the file of the state, which is no name that save gives",
    ),
    "no files": (lambda f: write_index(f, {"format": 1}), "lacks files, steps_called, hyperparameters"),
    "sums that are none": (_indexed(checksums=7), "has checksums that save does not give"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_index_that_save_does_not_write_is_a_sentence(how: str, tmp_path: Path) -> None:
    spoil, words = SPOILED[how]
    folder = tmp_path / "ck"
    trained().save(folder)
    spoil(folder)
    step = compiled(mlp(), mode="eager")
    with refused(step, ValueError, f"{folder} is damaged", words):
        step.load(folder)
    assert works(step)


def test_a_tensor_that_is_no_state_is_named(tmp_path: Path) -> None:
    trained().save(tmp_path)
    as_of_version_01(tmp_path)
    file = tmp_path / index_of(tmp_path)["files"]["state"]
    save_file({**load_file(file), "schedule/lr": torch.zeros(1)}, file)
    step = compiled(mlp(), mode="eager")
    with refused(step, ValueError, "holds schedule/lr, which is no part of a step's state"):
        step.load(tmp_path)


# ---------------------------------------------------------------------- where it may be written


def test_a_path_under_the_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trained().save("~/runs/one")
    assert (tmp_path / "runs" / "one" / "checkpoint.json").is_file()
    step = compiled(mlp(), mode="eager")
    step.load("~/runs/one")
    assert int(step.metrics["step"]) == 1


def test_a_file_and_another_programs_folder_are_not_written_into(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    step = trained()
    for path in (file, file / "below"):
        with refused(step, FileExistsError, f"{path} leads to a file; a checkpoint is a folder"):
            step.save(path)
    for content in ("{}", "not json", '{"weights": "w.bin"}'):
        theirs = tmp_path / "theirs"
        theirs.mkdir(exist_ok=True)
        (theirs / "checkpoint.json").write_text(content)
        with refused(step, FileExistsError, "checkpoint.json is not an index that TrainingStep.save() wrote"):
            step.save(theirs)
        assert [f.read_text() for f in theirs.iterdir()] == [content]


@pytest.mark.parametrize("name", ["train.log", "model.safetensors", "events"])
def test_a_folder_that_is_not_ours_is_not_written_into(name: str, tmp_path: Path) -> None:
    step = trained()
    if name == "events":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("theirs")
    with refused(step, FileExistsError, f"holds {name} and no checkpoint", "Give a new or empty one"):
        step.save(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == [name]
    step.save(tmp_path / "checkpoint")
    compiled(mlp(), mode="eager").load(tmp_path / "checkpoint")


def test_a_folder_that_is_ours_stays_ours_whatever_joins_it(tmp_path: Path) -> None:
    """Also one that holds checkpoints in folders of their own, hidden files, or what a killed save left."""
    step = trained()
    step.save(tmp_path / "run" / "best")
    (tmp_path / "run" / ".DS_Store").write_text("")
    step.save(tmp_path / "run")
    (tmp_path / "run" / "train.log").write_text("theirs")
    step.save(tmp_path / "run")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "model-1-0123abcd.safetensors").write_text("")
    step.save(tmp_path / "killed")
    compiled(mlp(), mode="eager").load(tmp_path / "killed")


def test_a_damaged_index_of_ours_does_not_stop_a_run_from_saving(tmp_path: Path) -> None:
    step = trained()
    step.save(tmp_path)
    (tmp_path / "checkpoint.json").write_text("{")
    step.save(tmp_path)
    compiled(mlp(), mode="eager").load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("older", [False, True])
def test_a_full_disk_is_a_sentence_and_leaves_the_older_checkpoint(older: bool, tmp_path: Path) -> None:
    """A limit on the size of files makes writing fail as a full disk does, in the middle of a file."""
    step = trained()
    if older:
        step.save(tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
        kept = "the checkpoint that was there is whole" if older else "nothing was left behind"
        with refused(step, OSError, f"{tmp_path} was not saved, because", kept, "save again"):
            step.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {f.name for f in tmp_path.iterdir()} == names
    if older:
        compiled(mlp(), mode="eager").load(tmp_path)
    step.save(tmp_path)
    compiled(mlp(), mode="eager").load(tmp_path)


def test_no_space_left_is_called_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="because the disk is full; nothing was left behind") as caught:
        trained().save(tmp_path)
    assert caught.value.errno == errno.ENOSPC


# ---------------------------------------------------------------------- several savers and readers


def test_a_saver_that_another_one_overtakes_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slow one has written its tensors and not its index, when the quick one saves."""
    slow, quick = trained(1), trained(2)
    quick.save(tmp_path)
    real = checkpoint_folder._write_index

    def overtaken(path: Path, index: Any) -> None:
        monkeypatch.setattr(checkpoint_folder, "_write_index", real)
        quick.save(tmp_path)
        fresh = compiled(mlp(), mode="eager")
        fresh.load(tmp_path)
        assert differing(bits(fresh), bits(quick)) == []
        real(path, index)

    monkeypatch.setattr(checkpoint_folder, "_write_index", overtaken)
    slow.save(tmp_path)
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert differing(bits(fresh), bits(slow)) == []  # it was the last to finish
    quick.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3  # nothing of the race is left


def test_without_locks_only_files_of_replaced_indexes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_folder, "fcntl", None)
    stranger = tmp_path / "model-7-0123abcd.safetensors"
    stranger.write_text("perhaps somebody's new file")
    step = trained()
    for _ in range(3):
        step.save(tmp_path)
    assert stranger.exists() and len(list(tmp_path.iterdir())) == 4
    compiled(mlp(), mode="eager").load(tmp_path)


def test_a_reader_that_a_saver_overtakes_reads_the_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading the index and opening its files the files were replaced."""
    old, new = trained(1), trained(2)
    old.save(tmp_path)
    real = checkpoint_folder._read_index

    def overtaken(folder: Path, verify: bool) -> dict[str, Any]:
        index = real(folder, verify)
        monkeypatch.setattr(checkpoint_folder, "_read_index", real)
        new.save(tmp_path)
        return index

    monkeypatch.setattr(checkpoint_folder, "_read_index", overtaken)
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    assert differing(bits(fresh), bits(new)) == []


def test_threads_that_save_and_load_at_once_see_whole_checkpoints(tmp_path: Path) -> None:
    savers = {steps: trained(steps) for steps in (1, 2)}
    savers[1].save(tmp_path)
    errors: list[BaseException] = []
    counts: list[int] = []

    def kept(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                for _ in range(12):
                    work()
            except BaseException as error:
                errors.append(error)

        return run

    def read() -> None:
        found = checkpoint_folder.load(tmp_path, torch.device("cpu"))
        counts.append(int(found["counts"]["step"]))
        assert found["steps_called"] == counts[-1]
        wanted = savers[counts[-1]].model.state_dict()
        assert all(torch.equal(t, wanted[n]) for n, t in found["model"].items())

    work = [*(lambda s=s: s.save(tmp_path) for s in savers.values()), read, read]
    threads = [threading.Thread(target=kept(w)) for w in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and set(counts) <= {1, 2} and len(counts) == 24


@pytest.mark.skipif(os.name != "posix", reason="Files stay where there are no locks.")
def test_a_save_that_ends_while_another_clears_away_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = trained(1), trained(2)
    own, meets = checkpoint_folder._is_alone, [second]

    def another_ends_just_before(lock: int) -> bool:
        if meets:
            meets.pop().save(tmp_path)
        return own(lock)

    monkeypatch.setattr(checkpoint_folder, "_is_alone", another_ends_just_before)
    first.save(tmp_path)
    assert checkpoint_folder.load(tmp_path, torch.device("cpu"))["steps_called"] == 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="The savers are forks of this process.")
@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_two_processes_save_into_one_folder(tmp_path: Path) -> None:
    """While both save as fast as they can, and afterwards, the checkpoint is one of theirs."""
    savers = [trained(1), trained(2)]
    children = []
    for step in savers:
        if not (child := os.fork()):
            try:
                for _ in range(40):
                    step.save(tmp_path)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    read, running = 0, dict.fromkeys(children)
    while running:
        for child in list(running):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0
                del running[child]
        if (tmp_path / "checkpoint.json").exists():
            found = checkpoint_folder.load(tmp_path, torch.device("cpu"))
            assert found["steps_called"] == int(found["counts"]["step"]) in (1, 2)
            read += 1
    assert read > 0
    fresh = compiled(mlp(), mode="eager")
    fresh.load(tmp_path)
    fresh.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
