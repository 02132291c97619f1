"""A folder with a compiled program: torch's own cache artifacts, the CPU's kernels, and for what they are.

One file holds all of it. It is written under another name beside it and renamed, so a reader finds the old program or
the new one. What it holds is code, so that it is to be trusted as code is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import warnings
import zipfile
from collections.abc import Iterable
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from fusion_compile._program.saved import _compat
from fusion_compile._program.saved.kind import machine_kind, other_kind, other_source, sources

FILE = "program.zip"
_FORMAT = 1
_INDEX, _ARTIFACTS, _KERNELS = "index.json", "artifacts.bin", "kernels/"


def save_program(path: str | PathLike[str], device: torch.device, written_in: Iterable[Any], what: str) -> None:
    """Write what this process has compiled into the folder `path`, which is made where it is missing.

    Args:
        path: The folder.
        device: On which the program runs.
        written_in: Functions and classes from whose source it was captured.
        what: What is saved, for messages.

    Raises ValueError where torch keeps no caches, and OSError where the file cannot be written.
    """
    artifacts = _compat.artifacts()
    if artifacts is None:
        raise ValueError(
            f"{what} cannot be saved: torch has kept nothing of what it compiled. Its caches are off "
            f"(TORCHINDUCTOR_FORCE_DISABLE_CACHES, TORCHINDUCTOR_FX_GRAPH_CACHE=0, or their settings in "
            f"torch.compiler.config and torch._inductor.config); switch them on and run again."
        )
    root = _compat.cache_folder()
    parts = {_ARTIFACTS: artifacts}
    parts |= {f"{_KERNELS}{f.relative_to(root).as_posix()}": f.read_bytes() for f in _compat.loaded_kernels()}
    index = {
        "format": _FORMAT,
        "kind": machine_kind(device),
        "vectors": _compat.vector_instructions(),
        "source": sources(written_in),
        "checksums": {name: _sum(part) for name, part in parts.items()},
    }
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FileExistsError(f"{folder} leads to a file; a saved program is a folder. Give another path.") from None
    beside = folder / f"{FILE}.{secrets.token_hex(4)}"
    try:
        with open(beside, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                archive.writestr(_INDEX, json.dumps(index, indent=1))
                for name, part in parts.items():
                    archive.writestr(name, part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, folder / FILE)
    except OSError as error:
        beside.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else f"a file could not be written ({error})"
        raise OSError(error.errno, f"{what} was not saved in {folder}, because {why}.") from error


def refuse_uncompiled(mode: str, backend: str) -> None:
    """Raise ValueError where a saved program would have no effect."""
    if mode == "eager" or backend != "inductor":
        now = "mode='eager'" if mode == "eager" else f"backend={backend!r}"
        raise ValueError(
            f"a program that was saved is compiled by Inductor, and {now} uses none; leave out one of both."
        )


def load_program(path: str | PathLike[str], device: torch.device, written_in: Iterable[Any]) -> bool:
    """Put a program that `save_program` wrote into torch's caches, where compiling finds it. Whether it was taken.

    A warning says why it was not: there is none, or it is for another torch or machine. Another warning names source
    that has changed since; what hangs on it is compiled anew.

    Raises ValueError if the file is damaged, and TypeError if `path` is none.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"program={path!r} is a {type(path).__name__}; give the folder that save_program() wrote.")
    file = Path(path).expanduser() / FILE
    if not file.is_file():
        warnings.warn(
            f"{file.parent} holds no saved program, so everything is compiled; save_program({str(path)!r}) writes one.",
            stacklevel=3,
        )
        return False
    index, parts = _read(file)
    if said := other_kind(index["kind"], machine_kind(device)):
        warnings.warn(
            f"the program in {file.parent} is not used: {said}. Everything is compiled; save_program() replaces it.",
            stacklevel=3,
        )
        return False
    if changed := other_source(index["source"], sources(written_in)):
        warnings.warn(
            f"{', '.join(changed)} changed since the program in {file.parent} was saved. What is no longer the same is "
            f"compiled anew; save_program() replaces it.",
            stacklevel=3,
        )
    root = _compat.cache_folder()
    for name, part in parts.items():
        if name.startswith(_KERNELS):
            _put(root / PurePosixPath(name).relative_to(_KERNELS), part)
    _compat.know_vector_instructions(index["vectors"])
    return _compat.take(parts[_ARTIFACTS])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The index and the parts. Raises ValueError unless the file is whole and every name in it is a plain one."""
    try:
        with zipfile.ZipFile(file) as archive:
            index = json.loads(archive.read(_INDEX))
            parts = {name: archive.read(name) for name in archive.namelist() if name != _INDEX}
        whole = {name: _sum(part) for name, part in parts.items()} == index["checksums"] and _ARTIFACTS in parts
        known = index["format"] == _FORMAT and isinstance(index["kind"], dict) and isinstance(index["source"], dict)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it and save the program again.") from error
    odd = [name for name in parts if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute()]
    if not whole or not known or odd:
        raise ValueError(f"{file} is damaged, or of another version of this package; delete it and save it again.")
    return index, parts


def _put(path: Path, content: bytes) -> None:
    """Write a kernel's library where torch looks for it, unless it lies there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    beside.write_bytes(content)
    beside.chmod(0o755)
    os.replace(beside, path)


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
