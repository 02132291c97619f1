"""Private API of Inductor's caches: where they lie, which kernels this process has loaded, what the CPU's compiler was
found to be able to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor


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


@contextlib.contextmanager
def kept_in_caches(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Inside, torch keeps what it compiles of a graph that Dynamo did not capture, as it keeps what Dynamo did. Gives
    what to compile the graph for in the place of `inputs`.

    Its caches ask the trace for assumptions about sizes. Without a trace there is nothing to ask, and nothing is kept:
    every process compiled such a graph anew. All sizes are numbers here, so that there are no assumptions.
    """
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv())
    with tracing(TracingContext(mode)):
        yield [mode.from_tensor(t, static_shapes=True) for t in inputs]


def artifacts() -> bytes | None:
    """What torch's compilers have put into their caches in this process; None if that is nothing."""
    made = torch.compiler.save_cache_artifacts()
    return None if made is None else made[0]


def take(given: bytes) -> bool:
    """Put `given` artifacts into torch's caches; whether torch could read them."""
    return torch.compiler.load_cache_artifacts(given) is not None
