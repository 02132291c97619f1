"""The last step's gradients where the ordinary loop leaves them, in ``parameter.grad``, for steps that keep them."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._state import keys
from fusion_compile._state.banks import Layout
from fusion_compile._types import Tensors


class KeptGradients:
    """Banks of gradients in the flat state, and the parameters that show them.

    A bank has the dtype of its parameters, as ``.grad`` has, and the same memory in every step. As with parameters,
    each view has a storage of its own, so that whatever is saved by storage is that part.

    Args:
        model: Its trainable parameters lie in `layout`.
        layout: The banks.
        state: The flat state; the banks join it.
    """

    def __init__(self, model: nn.Module, layout: Layout, state: Tensors) -> None:
        self._parameters = dict(model.named_parameters())
        banks: Tensors = {}
        for bank in layout.banks:
            banks[bank.key] = torch.zeros(bank.shape, dtype=bank.dtype, device=layout.device)
            _compat.mark_static(banks[bank.key])
            state[keys.gradients(bank.key)] = banks[bank.key]
        self._views: Tensors = {
            name: torch.from_dlpack(view)  # type: ignore[attr-defined]
            for name, view in layout.views(banks).items()
        }

    def show(self, unread: Collection[str]) -> None:
        """Let ``.grad`` be the step's gradient. `unread`: names of parameters that the loss does not read; theirs is
        None, as in the ordinary loop."""
        for name, view in self._views.items():
            parameter = self._parameters[name]
            if name in unread:
                parameter.grad = None
            elif parameter.grad is not view:
                parameter.grad = view
        torch.autograd.graph.increment_version(list(self._views.values()))  # the program wrote the banks

    def drop(self) -> None:
        """Let no parameter show a gradient of the step any longer."""
        for name, view in self._views.items():
            if self._parameters[name].grad is view:
                self._parameters[name].grad = None
        self._views.clear()


def kept_gradients(layout: Layout, gradients: Tensors, state: Tensors) -> Tensors:
    """What `state` has to keep of `gradients` (banks in the state dtype); nothing where it keeps none."""
    kept = {bank: keys.gradients(bank.key) for bank in layout.banks}
    return {key: gradients[bank.key].to(bank.dtype) for bank, key in kept.items() if key in state}
