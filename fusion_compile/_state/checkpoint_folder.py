"""A checkpoint's folder: files of tensors, and a JSON index that names them and is renamed into place last.

One process writes two safetensors files; several ranks write a folder of parts (`checkpoint_parts`).

Any number of processes may save into one folder and read it. Every save writes files under names of its own, so savers
never meet; the index is replaced in one moment, so a reader finds the old checkpoint or the new one. A file is removed
when no index names it any more and nobody is writing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusion_compile._state import checkpoint_parts, checksums
from fusion_compile._types import Tensors

try:
    import fcntl
except ImportError:  # no POSIX; a dead process's files then stay
    fcntl = None  # type: ignore[assignment]

FORMAT, OF_PARTS = 1, 2
INDEX = "checkpoint.json"
STATE_SECTIONS = ("optimizer", "counts", "buffers", "carried", "rng")
_TENSORS = re.compile(r"(model|state)-(\d+-[0-9a-f]{8})\.safetensors")
_PARTS = re.compile(r"parts-\d+-[0-9a-f]{8}")
_WRITTEN = re.compile(rf"{_TENSORS.pattern}|{_PARTS.pattern}|{re.escape(INDEX)}\.\d+-[0-9a-f]{{8}}")
"""Names of the files that `save` makes besides the index. Nothing else in the folder is ever removed."""
_READS = 20
"""How often a reader looks again because a saver replaced the checkpoint while it was read."""


class _Replaced(Exception):
    """The files that the index named are gone, because a saver has replaced it."""


# ---------------------------------------------------------------------- writing


def save(path: str | PathLike[str], saved: Mapping[str, Any]) -> None:
    """Write the folder `path`: ``model-….safetensors`` (the deployable weights), ``state-….safetensors`` and the index.

    The tensor files are written under new names and flushed first. Renaming the index into place is the one moment at
    which the new checkpoint exists. A process killed before it leaves the old checkpoint, one killed after it the new.

    Raises OSError where the disk is full or a file cannot be written, and FileExistsError where `path` is a file or
    another program's folder. An older checkpoint stays as it was.
    """
    folder, tag = made(path), new_tag(saved["steps_called"])
    files = {"model": f"model-{tag}.safetensors", "state": f"state-{tag}.safetensors"}
    with replacing(folder, tag, [*files.values()]) as put_index:
        state = {f"{s}/{n}": t for s in STATE_SECTIONS for n, t in saved.get(s, {}).items()}
        sums = {
            "model": _write_tensors(folder / files["model"], saved["model"]),
            "state": _write_tensors(folder / files["state"], state),
        }
        put_index(index_of(saved, FORMAT, files, sums))


def new_tag(steps: int) -> str:
    """What names the files of one checkpoint."""
    return f"{steps}-{secrets.token_hex(4)}"


@contextmanager
def replacing(folder: Path, tag: str, names: Sequence[str]) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Inside, write the files or folders `names`, and last give their index to what this yields.

    Raises OSError where that fails; what was written is removed, and the older checkpoint is the present one.
    """
    temporary = folder / f"{INDEX}.{tag}"
    former: set[str] = set()

    def put_index(index: Mapping[str, Any]) -> None:
        _write_index(temporary, index)
        former.update(_names_in_use(folder))
        os.replace(temporary, folder / INDEX)

    with _writing(folder) as lock:
        try:
            yield put_index
        except (OSError, SafetensorError) as error:
            for name in {temporary.name, *names} - _names_in_use(folder):
                _remove(folder / name)
            raise _unwritten(folder, error) from error
        _sync_folder(folder)
        _clear_away(folder, former, lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def index_of(
    saved: Mapping[str, Any], form: int, files: dict[str, str], sums: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """The index of a checkpoint. `saved`: its plain values. `sums`: checksums by file and tensor."""
    index = {
        "format": form,
        "files": files,
        "steps_called": saved["steps_called"],
        "hyperparameters": saved["hyperparameters"],
        "numbers": saved.get("numbers", {}),
        "torch": torch.__version__,
        "computed_on": saved.get("computed_on", {}),
        "checksums": sums,
        **({"stacks": saved["stacks"]} if "stacks" in saved else {}),
    }
    return {**index, "checksum": checksums.of_index(index)}


def _write_index(path: Path, index: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(index, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(path: Path, tensors: Tensors) -> dict[str, str]:
    """Write `tensors` and return their checksums."""
    # Tied weights appear under two names with one storage, which safetensors refuses; each name is written in full.
    plain = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    sums = checksums.of_tensors(plain)
    save_file(plain, path)
    # safetensors makes its files private; a checkpoint is as readable as the folder it lies in.
    path.chmod(path.parent.stat().st_mode & 0o666)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return sums


def made(path: str | PathLike[str]) -> Path:
    """The folder `path`, made where it is missing. Another program's is refused."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(f"{folder} leads to a file; a checkpoint is a folder. Give another path.") from None
    index = folder / INDEX
    if index.exists() and not _is_ours(folder, index):
        raise FileExistsError(
            f"{index} is not an index that TrainingStep.save() wrote, and would be lost. Give a folder of its own."
        )
    if not index.exists() and (theirs := _others(folder)):
        raise FileExistsError(
            f"{folder} holds {theirs} and no checkpoint, so it is not written into: a checkpoint is a folder of its "
            f"own. Give a new or empty one, {str(folder / 'checkpoint')!r} for example."
        )
    return folder


def _others(folder: Path) -> str:
    """The first thing in a folder in which nothing is ours; empty where something is, or where there is nothing.

    Hidden files (a file browser's) and folders that are checkpoints themselves count as nothing.
    """
    found = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    if any(_WRITTEN.fullmatch(name) for name in found):
        return ""
    return next((name for name in found if not (folder / name / INDEX).is_file()), "")


def _is_ours(folder: Path, index: Path) -> bool:
    """Whether `index` is one of ours, perhaps a damaged one: then files of ours lie beside it."""
    try:
        found = json.loads(index.read_bytes())
        if isinstance(found, dict) and "format" in found and "files" in found:
            return True
    except (ValueError, RecursionError, OSError):
        pass
    return any(_TENSORS.fullmatch(file.name) for file in folder.iterdir())


def _unwritten(folder: Path, error: Exception) -> OSError:
    code = error.errno if isinstance(error, OSError) else None
    full = code in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "quota" in str(error)
    what = "the disk is full" if full else f"a file could not be written ({error})"
    kept = "the checkpoint that was there is whole" if (folder / INDEX).exists() else "nothing was left behind"
    said = f"{folder} was not saved, because {what}; {kept}. Make room or give another path, and save again."
    return OSError(errno.ENOSPC if full else code or errno.EIO, said)


@contextmanager
def _writing(folder: Path) -> Iterator[int | None]:
    """Say to other processes that somebody writes into `folder`. Yields the lock; None where there are no locks."""
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError:  # some network file systems have none
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)  # and with it the lock


def _clear_away(folder: Path, former: set[str], lock: int | None) -> None:
    """Remove files that nobody needs: those of the index that was replaced, and what dead processes left."""
    # First: another process that ends its save after the index was read, and before this one is alone, would lose it.
    alone = lock is not None and _is_alone(lock)
    in_use = _names_in_use(folder)
    found = [file for file in folder.iterdir() if _WRITTEN.fullmatch(file.name) and file.name not in in_use]
    for file in found:
        # Unless this process is the only one that writes, a file that no index ever named may be another's new one.
        if alone or file.name in former:
            _remove(file)


def _is_alone(lock: int) -> bool:
    """Whether no other process writes. Until the lock is given back none begins."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _names_in_use(folder: Path) -> set[str]:
    """The files that the present index names."""
    try:
        files = json.loads((folder / INDEX).read_bytes())["files"]
        return {name for name in files.values() if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------- reading


def load(path: str | PathLike[str], device: torch.device, *, verify: bool = True) -> dict[str, Any]:
    """Read a folder that `save` wrote. Anything else is a FileNotFoundError or ValueError.

    `verify`: compare tensors and index with their checksums, which checkpoints of version 0.1 do not have.
    """
    folder = Path(path).expanduser()
    for _ in range(_READS):
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"{folder} holds no {INDEX}; give the folder that TrainingStep.save() wrote.")
        index = _read_index(folder, verify)
        try:
            return _read(folder, index, device, verify)
        except _Replaced:
            if _names_in_use(folder) == {*index["files"].values()}:
                raise _damaged(folder, "a file that its index names is missing") from None
    raise ValueError(f"{folder} was replaced {_READS} times while it was read; load it when less is saved there.")


def _damaged(folder: Path, what: str) -> ValueError:
    return ValueError(f"{folder} is damaged: {what}. Nothing was loaded. Give another checkpoint.")


def _read_index(folder: Path, verify: bool) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{INDEX} is no JSON ({error})") from error
    if not isinstance(index, dict) or "format" not in index:
        raise _damaged(folder, f"{INDEX} is no index of a checkpoint, because it has no format")
    if index["format"] not in (FORMAT, OF_PARTS):
        raise ValueError(
            f"{folder / INDEX} has format {index['format']}; this version reads formats {FORMAT} and {OF_PARTS}."
        )
    summed = {"checksum", "checksums"} & index.keys()  # version 0.1 wrote neither
    if verify and summed and index.get("checksum") != checksums.of_index(index):
        raise ValueError(
            f"{folder} is damaged: {INDEX} is not as it was written. Nothing was loaded. Give another checkpoint; if "
            f"you changed it yourself, load it with verify=False."
        )
    if absent := [key for key in ("files", "steps_called", "hyperparameters") if key not in index]:
        raise _damaged(folder, f"{INDEX} lacks {', '.join(absent)}")
    if index["format"] == OF_PARTS:
        name = index["files"].get("parts") if isinstance(index["files"], dict) else None
        if not (isinstance(name, str) and _PARTS.fullmatch(name)):
            raise _damaged(folder, f"{INDEX} names {name!r} as the folder of the parts, which is no name of save")
    else:
        _check_files(folder, index["files"])
    return index


def _check_files(folder: Path, files: Any) -> None:
    """Only names that `save` gives, of one checkpoint: a name may not lead out of the folder."""
    tags = set()
    for kind in ("model", "state"):
        name = files.get(kind) if isinstance(files, dict) else None
        match = _TENSORS.fullmatch(name) if isinstance(name, str) else None
        if match is None or match[1] != kind:
            raise _damaged(
                folder, f"{INDEX} names {name!r} as the file of the {kind}, which is no name that save gives"
            )
        tags.add(match[2])
    if len(tags) > 1:
        raise _damaged(folder, f"{INDEX} names files of two checkpoints, {' and '.join(files.values())}")


def _read(folder: Path, index: Mapping[str, Any], device: torch.device, verify: bool) -> dict[str, Any]:
    sums = index.get("checksums") if verify else None
    if sums is not None and not (isinstance(sums, dict) and all(isinstance(sums.get(k), dict) for k in index["files"])):
        raise _damaged(folder, f"{INDEX} has checksums that save does not give")
    if index["format"] == OF_PARTS:
        sections = _read_parts(folder, index, device, sums and sums["parts"])
    else:
        sections = {section: {} for section in STATE_SECTIONS}
        for name, tensor in _read_tensors(folder, index["files"]["state"], device, sums and sums["state"]):
            section, _, rest = name.partition("/")
            if section not in sections:
                raise _damaged(folder, f"{index['files']['state']} holds {name}, which is no part of a step's state")
            sections[section][rest] = tensor
        sections["model"] = dict(_read_tensors(folder, index["files"]["model"], device, sums and sums["model"]))
    kept = {key: index[key] for key in ("steps_called", "hyperparameters")}
    computed_on = index.get("computed_on", {})
    if not (isinstance(computed_on, dict) and all(isinstance(value, str) for value in computed_on.values())):
        raise _damaged(folder, f"{INDEX} says {computed_on!r} about the machine, which is nothing that save writes")
    return {**kept, "numbers": index.get("numbers", {}), "computed_on": computed_on, **sections}


def _read_tensors(
    folder: Path, name: str, device: torch.device, expected: Mapping[str, Any] | None
) -> list[tuple[str, Tensor]]:
    """Read a file's tensors by name, compared with their checksums where some are `expected`."""
    try:
        # Checksums are of bytes on the CPU.
        with safe_open(folder / name, framework="pt", device="cpu" if expected is not None else str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RuntimeError, FileNotFoundError) as error:
        if not (folder / name).exists():  # whichever of the two that open it, safetensors or torch, found it gone
            raise _Replaced from error
        raise _damaged(folder, f"{name} is no safetensors file ({error})") from error
    _compare(folder, name, tensors, expected)
    return [(key, tensor.to(device)) for key, tensor in tensors.items()]


def _compare(folder: Path, name: str, tensors: Tensors, expected: Mapping[str, Any] | None) -> None:
    if expected is not None and (lines := checksums.damaged(tensors, expected)):
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise ValueError(
            f"{folder} is damaged: in {name}, {lines[0]}{more}. Nothing was loaded. Give another checkpoint, or load "
            f"this one as it is with verify=False."
        )


def _read_parts(
    folder: Path, index: Mapping[str, Any], device: torch.device, expected: Mapping[str, Any] | None
) -> dict[str, Tensors]:
    """The sections of a checkpoint that several ranks wrote."""
    name = index["files"]["parts"]
    try:
        tensors = checkpoint_parts.read(folder / name)
    except checkpoint_parts.UNREADABLE as error:
        if not (folder / name).exists():
            raise _Replaced from error
        raise _damaged(folder, f"{name} cannot be read by torch.distributed.checkpoint ({error})") from error
    _compare(folder, name, tensors, expected)
    sections: dict[str, Tensors] = {section: {} for section in ("model", *STATE_SECTIONS)}
    for key, tensor in checkpoint_parts.with_whole_stacks(tensors, index.get("stacks", {})).items():
        section, _, rest = key.partition(".")
        if section not in sections:
            raise _damaged(folder, f"{name} holds {key}, which is no part of a step's state")
        sections[section][rest] = tensor.to(device)
    return sections
