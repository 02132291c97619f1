"""A decorated forward: torch tells the size of ``args[1]``, at the decorator's line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.explain.example import Example

EXPECTED = {"kind": "dynamic_shape", "line_contains": "self.project(images", "op": "images.shape[0]"}


def logged(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    return inner


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    @logged
    def forward(self, images: Tensor) -> Tensor:
        return self.project(images).relu()


def broken() -> Example:
    return Example(Classifier(), (torch.randn(8, 4),), ((torch.randn(6, 4),),))


def repaired() -> Example:
    return Example(Classifier(), (torch.randn(8, 4),), ((torch.randn(8, 4),),))
