"""Private torch API of this room, behind feature probes. torch 2.11 to 2.15."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

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


def hooks_registered() -> int:
    """How many hooks of any kind were ever registered through torch's functions; -1 at all times where torch does not
    count them."""
    count = getattr(RemovableHandle, "next_id", -1)
    return count if isinstance(count, int) else -1
