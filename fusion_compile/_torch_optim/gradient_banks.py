"""The memory into which the gradients of a step are gathered: the same at each step, so that none is fresh."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._state.banks import Layout
from fusion_compile._torch_optim._compat import clear_each, copy_each, negate_each
from fusion_compile._types import Tensors


class GradientBanks:
    """Banks of gradients in the parameters' dtype, made at the first step.

    Fresh memory for each step would cost more than the copy: the operating system maps and clears its pages at the
    first touch. No ``.grad`` views these banks: somebody may hold a gradient (of each of several tasks) for longer
    than a step.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._banks: Tensors = {}
        self._places: Tensors = {}

    def gather(self, members: Mapping[str, nn.Parameter], given: Tensors, *, uphill: bool) -> Tensors:
        """Copy the gradients by parameter into the banks; one that `given` lacks is zero. `uphill`: with the other
        sign."""
        if not self._banks:
            make = torch.zeros  # what lies between two parameters is zero, and stays it
            self._banks = {b.key: make(b.shape, dtype=b.dtype, device=self._layout.device) for b in self._layout.banks}
            self._places = self._layout.views(self._banks)
            for bank in self._banks.values():
                _compat.mark_static(bank)
        places = self._places
        copy_each([places[name] for name in given], [g.detach() for g in given.values()])
        if len(given) < len(members) and (absent := [places[name] for name in members if name not in given]):
            clear_each(absent)
        if uphill:
            negate_each([*self._banks.values()])
        return dict(self._banks)
