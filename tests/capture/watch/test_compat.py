"""Private torch API that this room uses."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._capture.python_state._compat import global_module_hooks
from fusion_compile._capture.watch._compat import hooks_registered


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


def test_every_registered_hook_counts() -> None:
    before = hooks_registered()
    nn.Tanh().register_forward_hook(lambda module, given, out: None)
    torch.ones(1, requires_grad=True).register_hook(lambda gradient: None)
    assert hooks_registered() == before + 2
