"""Private torch API that reading state needs does what it is taken for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fusion_compile._capture.python_state._compat import global_module_hooks, hooks_of, without_torch_function


def test_hooks_of_a_tensor() -> None:
    def first(gradient: Any) -> None: ...
    def second(parameter: Any) -> None: ...

    tensor = nn.Parameter(torch.ones(1))
    assert hooks_of(tensor) == ()
    tensor.register_hook(first)
    tensor.register_post_accumulate_grad_hook(second)
    assert hooks_of(tensor) == (first, second)


def test_attributes_of_a_subclass_are_read_without_its_torch_function() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("user code was called")

    tensor = torch.ones(2).as_subclass(Loud)
    with without_torch_function():
        assert tensor.grad is None and tensor.is_leaf


def test_hooks_around_every_module() -> None:
    assert list(global_module_hooks()) == [
        "forward hook of all modules",
        "forward pre-hook of all modules",
        "backward hook of all modules",
        "backward pre-hook of all modules",
    ]
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: None)
    try:
        assert [len(hooks) for hooks in global_module_hooks().values()] == [1, 0, 0, 0]
    finally:
        handle.remove()
