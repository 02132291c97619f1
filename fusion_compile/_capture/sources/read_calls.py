"""Which functions of Python, torch and C read something that no object holds, by the function itself."""

from __future__ import annotations

import builtins
import contextvars
import datetime
import dis
import functools
import io
import os
import random
import sys
import time
import types
from collections.abc import Hashable
from typing import Any, cast

import torch

from fusion_compile._capture.python_state.whose_code import is_user_code
from fusion_compile._capture.sources.who_asks import is_torch

Reading = str
"""``"clock"``, ``"environment"``, ``"file"``, ``"network"``, ``"random"``, ``"torch random"``, ``"context"``,
``"iterator"``, ``"output"``, ``"user"`` (a function of the user's), or ``""``."""

_CLOCKS = {"ctime", "asctime", "strftime", "localtime", "gmtime", "clock_gettime", "clock_gettime_ns"}
_CLOCKS |= {
    name + unit for name in ("time", "monotonic", "perf_counter", "process_time", "thread_time") for unit in ("", "_ns")
}
_FILES = ("stat", "lstat", "access", "readlink", "read", "pread", "readv", "getxattr")
_ENTROPY = ("urandom", "getrandom")


def _functions() -> dict[Any, Reading]:
    found: dict[Any, Reading] = {getattr(time, n): "clock" for n in _CLOCKS if hasattr(time, n)}
    found |= {getattr(os, n): "file" for n in _FILES if hasattr(os, n)}
    found |= {getattr(os, n): "random" for n in _ENTROPY if hasattr(os, n)}
    found |= {os.times: "clock", builtins.input: "file", builtins.print: "output"}
    uuids = getattr(sys.modules.get("_uuid"), "generate_time_safe", None)
    return found | ({uuids: "random"} if uuids is not None else {})


_FUNCTIONS = _functions()
_DATES = ("now", "utcnow", "today")
_SEEDING = {"manual_seed", "seed", "set_state", "set_offset", "graphsafe_set_state", "clone_state"}
_TORCH_SEEDING = {
    "manual_seed",
    "manual_seed_all",
    "seed",
    "seed_all",
    "set_rng_state",
    "set_rng_state_all",
    "fork_rng",
    "set_state",
}
_TORCH_RANDOM = ("random.py", "cuda/random.py", "xpu/random.py", "mps/__init__.py", "mtia/__init__.py")
_GET_ENVIRON = type(os.environ).__getitem__.__code__
_NEW_RANDOM = random.Random.__init__.__code__
_NUMPY_DRAWS = {
    *("rand", "randn", "randint", "random", "random_sample", "sample", "integers", "bytes", "choice", "shuffle"),
    *("permutation", "permuted", "normal", "standard_normal", "uniform", "beta", "binomial", "exponential", "gamma"),
    *("geometric", "laplace", "lognormal", "multinomial", "poisson"),
}
_ITERATING = {"FOR_ITER", "GET_ITER", "UNPACK_SEQUENCE", "UNPACK_EX", "LIST_EXTEND", "SET_UPDATE", "CONTAINS_OP"}
_ITERATING_CALLS = {
    "list",
    "tuple",
    "set",
    "dict",
    "sum",
    "max",
    "min",
    "any",
    "all",
    "sorted",
    "zip",
    "islice",
    "join",
}


def builtin_reading(function: Any) -> Reading | None:
    """What a call of a C function reads; None for nothing."""
    found = _FUNCTIONS.get(function)
    if found is not None:
        return found
    owner = function.__self__
    kind = type(owner)
    if kind is types.ModuleType:
        return None
    if kind is type:
        return "clock" if function.__name__ in _DATES and issubclass(owner, datetime.date) else None
    return _method_reading(cast(Hashable, kind), function.__name__)


@functools.lru_cache(maxsize=4096)
def _method_reading(kind: Any, name: str) -> Reading | None:
    if issubclass(kind, random.Random):
        return "random" if name in ("random", "getrandbits", "seed", "setstate") else None
    if kind is torch.Generator:
        return "torch random" if name in _SEEDING else None
    if kind is contextvars.ContextVar:
        return "context" if name in ("get", "set") else None
    if issubclass(kind, io.IOBase):
        in_memory = issubclass(kind, (io.BytesIO, io.StringIO))
        return (
            None if in_memory else "file" if name.startswith("read") else "output" if name.startswith("write") else None
        )
    if any(k.__module__ == "_socket" for k in kind.__mro__):
        return "network" if name.startswith(("recv", "send", "connect", "accept")) else None
    if kind.__module__ == "_queue":
        return "iterator" if name in ("get", "get_nowait") else None
    return None


def python_reading(code: types.CodeType) -> Reading:
    """What a call of a Python function reads, or ``"user"``."""
    if code is _GET_ENVIRON:
        return "environment"
    if code is _NEW_RANDOM:
        return "random"
    path = code.co_filename
    if is_torch(path):
        if code.co_name in _TORCH_SEEDING and is_torch(path, *_TORCH_RANDOM):
            return "torch random"
        return "iterator" if code.co_name == "__next__" and is_torch(path, "utils/data/dataloader.py") else ""
    return "user" if is_user_code(path) else ""


@functools.lru_cache(maxsize=4096)
def iterates(code: types.CodeType) -> bool:
    """Whether a function may move an iterator on without calling `next`."""
    if not _ITERATING_CALLS.isdisjoint(code.co_names):
        return True
    return any(i.opname in _ITERATING for i in dis.get_instructions(code))


@functools.lru_cache(maxsize=4096)
def is_numpy_draw(code: types.CodeType) -> bool:
    """Whether a function names something that numpy's random generators do."""
    return not _NUMPY_DRAWS.isdisjoint(code.co_names)
