"""The names of globals are read out of bytecode, nested functions included."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch.nn import functional

from fusion_compile._capture.rehearsal.named_globals import follows_globals, is_followed_module, names_of

FIRST = SECOND = THIRD = FOURTH = 0


def reads_and_writes(x: Any) -> Any:
    global SECOND
    SECOND = FIRST + x.attribute
    return [lambda: THIRD, *(y + FOURTH for y in x)]


def test_globals_are_told_from_attributes() -> None:
    names = names_of(reads_and_writes.__code__)
    assert names.of_globals == {"FIRST", "SECOND", "THIRD", "FOURTH"}
    assert names.others - names.of_globals == {"attribute"}


def test_more_than_256_names_are_read() -> None:
    """Arguments of more than one byte have prefixes."""
    source = "def many():\n    return [" + ", ".join(f"name_{i}" for i in range(300)) + "]"
    scope: dict[str, Any] = {}
    exec(source, scope)
    assert names_of(scope["many"].__code__).of_globals == {f"name_{i}" for i in range(300)}


def test_whose_globals_are_followed() -> None:
    assert follows_globals(reads_and_writes)
    assert not follows_globals(functional.linear if isinstance(functional.linear, types.FunctionType) else _of_torch())
    assert is_followed_module(types.ModuleType("my_settings"))
    assert not is_followed_module(math) and not is_followed_module(torch)


def _of_torch() -> types.FunctionType:
    function = functional.relu
    assert isinstance(function, types.FunctionType)
    return function
