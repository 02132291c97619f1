"""Private torch API that reading Python's state needs. torch 2.11 to 2.15; never a version compare."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
"""Attributes of a tensor that are None, or a dictionary of the hooks that were registered on it."""

WRITTEN_BY_DYNAMO = ("__init__", "__setstate__", "___needs_generation_tag_patch")
"""Entries of `nn.Module` that torch.compile writes when it first runs. No call of a module reads them."""


def without_torch_function() -> contextlib.AbstractContextManager[Any]:
    """Inside, attributes of tensor subclasses are read without their ``__torch_function__``."""
    return torch._C.DisableTorchFunctionSubclass()


def hooks_of(tensor: Tensor) -> tuple[Any, ...]:
    """The functions that torch calls when `tensor`'s gradient arrives."""
    both = (getattr(tensor, name, None) for name in TENSOR_HOOKS)
    return tuple(hook for hooks in both for hook in (hooks or {}).values())


_GLOBAL_HOOKS = {
    "forward hook of all modules": "_global_forward_hooks",
    "forward pre-hook of all modules": "_global_forward_pre_hooks",
    "backward hook of all modules": "_global_backward_hooks",
    "backward pre-hook of all modules": "_global_backward_pre_hooks",
}


def global_module_hooks() -> dict[str, dict[Any, Any]]:
    """What torch calls around every module, by what it is; a dictionary that this torch lacks is left out."""
    found = {label: getattr(torch.nn.modules.module, name, None) for label, name in _GLOBAL_HOOKS.items()}
    return {label: hooks for label, hooks in found.items() if isinstance(hooks, dict)}
