"""Files and objects are the user's, a library's, torch's or Python's."""

from __future__ import annotations

import logging
import math
import types

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fusion_compile._capture.python_state import whose_code
from fusion_compile._capture.python_state.whose_code import (
    follows_globals,
    is_foreign,
    is_foreign_package,
    is_standard_library,
    is_user_code,
    reads_count,
)
from fusion_compile.passes._user_frame import TORCH


def test_files() -> None:
    assert is_user_code(__file__) and is_user_code("<stdin>")
    assert is_standard_library(logging.__file__) and not is_user_code(logging.__file__)
    assert not is_user_code(torch.nn.__file__) and not is_user_code(whose_code.__file__)
    assert is_standard_library("<frozen os>")


def test_whose_reads_count() -> None:
    assert reads_count(__file__)
    assert reads_count(TORCH + "nn/modules/dropout.py")
    assert not reads_count(TORCH + "nn/modules/module.py")
    assert not reads_count(TORCH + "nn/functional.py")
    assert not reads_count(types.__file__)
    assert not reads_count("<frozen importlib._bootstrap>")


def test_whose_globals_are_followed() -> None:
    assert isinstance(test_files, types.FunctionType) and isinstance(functional.relu, types.FunctionType)
    assert follows_globals(test_files) and not follows_globals(functional.relu)


class OfTheUser:
    def method(self) -> None: ...


def test_what_nobody_changes_between_steps() -> None:
    assert all(map(is_foreign, (math, torch, np, torch.nn, nn.Linear, functional.relu, len, logging.Logger)))
    assert not any(map(is_foreign, (types.ModuleType("my_settings"), OfTheUser, OfTheUser.method, OfTheUser(), 3)))
    assert is_foreign_package("torch.nn") and is_foreign_package(None)
    assert not is_foreign_package("torchvision.models") and not is_foreign_package("__main__")
