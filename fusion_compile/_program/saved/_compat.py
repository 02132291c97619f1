"""Private API of Inductor's caches: where they lie, which kernels this process has loaded, what the CPU's compiler was
found to be able to."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def cache_folder() -> Path:
    """The folder in which Inductor keeps what it has compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def loaded_kernels() -> list[Path]:
    """The libraries of Inductor's C++ kernels that this process has loaded, in its cache folder."""
    root, found = cache_folder(), []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file.endswith((".so", ".pyd", ".dylib")):
            path = Path(file).resolve()
            if path.is_relative_to(root) and path.is_file():
                found.append(path)
    return sorted(set(found))


def vector_instructions() -> list[str]:
    """The vector instructions that torch has found to work with this CPU and its compiler; empty if it has not looked.

    The first look compiles a file, and each process runs a small program.
    """
    known = getattr(_isas(), "valid_vec_isa_list", None)
    if known is None or not hasattr(known, "cache_info") or not known.cache_info().currsize:
        return []
    return [str(one) for one in known()]


def know_vector_instructions(found: list[str]) -> bool:
    """Take for found what a process on the same kind of machine has `found`, if this CPU says that it has it. Whether
    it was taken; if not, torch looks itself."""
    known = getattr(_isas(), "valid_vec_isa_list", None)
    if not found or known is None or not hasattr(known, "cache_clear"):
        return False
    if known.cache_info().currsize:
        return True
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": True}):
        same = [str(one) for one in known()] == found
    if not same:
        known.cache_clear()
    return same


def _isas() -> object:
    from torch._inductor import cpu_vec_isa

    return cpu_vec_isa


def artifacts() -> bytes | None:
    """What torch's compilers have put into their caches in this process; None if that is nothing."""
    made = torch.compiler.save_cache_artifacts()
    return None if made is None else made[0]


def take(given: bytes) -> bool:
    """Put `given` artifacts into torch's caches; whether torch could read them."""
    return torch.compiler.load_cache_artifacts(given) is not None
