"""Whose code runs, and whose objects lie there: the user's and libraries', or torch's, Python's and ours.

Libraries of models count as the user's: what transformers keeps in an attribute is a training program's state like
anything else.
"""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
import types
from typing import Any

from fusion_compile.passes._user_frame import TORCH, is_outside_torch, is_the_users

_STANDARD_LIBRARY = tuple({os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib")})
_SITE_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_TORCH_MODULES = tuple(os.path.join(TORCH, "nn", folder, "") for folder in ("modules", "utils"))
_MACHINERY = os.path.join(TORCH, "nn", "modules", "module.py")
"""`nn.Module` itself reads the hooks of every module at every call; a watch knows these without reading."""

FOREIGN_PACKAGES = frozenset(
    {
        *(sys.stdlib_module_names - {"__main__"}),
        *(
            "torch",
            "fusion_compile",
            "numpy",
            "scipy",
            "sympy",
            "pandas",
            "matplotlib",
            "PIL",
            "triton",
            "rich",
            "tqdm",
        ),
        *("pytest", "_pytest", "IPython", "huggingface_hub", "tokenizers", "safetensors", "networkx"),
        *("httpx", "httpcore", "requests", "urllib3", "psutil", "filelock", "packaging", "yaml", "regex"),
    }
)
"""Packages whose globals, and whose objects unless said otherwise, are not a training program's state: nobody changes
these between two steps."""


@functools.lru_cache(maxsize=4096)
def is_standard_library(path: str) -> bool:
    """Whether a file belongs to Python itself, or is generated code that acts for whoever called it."""
    if path.startswith("<"):
        return not is_outside_torch(path)
    full = os.path.abspath(path)
    return full.startswith(_STANDARD_LIBRARY) and not any(mark in full for mark in _SITE_PACKAGES)


@functools.lru_cache(maxsize=4096)
def is_user_code(path: str) -> bool:
    """Whether a file is the user's or a library's: neither torch's, nor this package's, nor Python's."""
    return is_the_users(path) and not is_standard_library(path)


@functools.lru_cache(maxsize=4096)
def reads_count(path: str) -> bool:
    """Whether what a file's functions read decides what a capture holds: user code, and the modules of ``torch.nn``."""
    return path != _MACHINERY if path.startswith(_TORCH_MODULES) else is_user_code(path)


def is_foreign_package(module: object) -> bool:
    """Whether a module's full name belongs to one of `FOREIGN_PACKAGES`, or is none."""
    return not isinstance(module, str) or module.partition(".")[0] in FOREIGN_PACKAGES


def is_foreign(value: Any) -> bool:
    """Whether `value` is a module, class or function of a foreign package."""
    if isinstance(value, types.ModuleType):
        return is_foreign_package(vars(value).get("__name__"))
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        return is_foreign_package(getattr(value, "__module__", None))
    return False


def follows_globals(function: types.FunctionType) -> bool:
    """Whether the globals of `function` may be a training program's state."""
    return not is_foreign_package(function.__globals__.get("__name__")) and is_user_code(function.__code__.co_filename)
