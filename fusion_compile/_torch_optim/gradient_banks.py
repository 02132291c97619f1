"""The memory into which the gradients of a step are gathered: the same at each step, so that none is fresh.

Updates that read gradients where they lie (`run_programs`) need none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from fusion_compile import _compat
from fusion_compile._state.banks import Layout
from fusion_compile._torch_optim._compat import clear_each, copy_each, negate_each
from fusion_compile._torch_optim.moved_gradients import MovedGradients
from fusion_compile._types import Tensors


class GradientBanks:
    """Banks of gradients in the parameters' dtype, made at the first step.

    Fresh memory for each step would cost more than the copy: the operating system maps and clears its pages at the
    first touch. From the second step on large gradients are moved here during the backward, and ``.grad`` is a view of
    their places. Once somebody holds such a gradient for longer than a step (of each of several tasks), no gradient is
    moved any more: the banks are left to whoever holds them, and others take their place.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._banks: Tensors = {}
        self._places: Tensors = {}
        self._moved: MovedGradients | None = None
        self._moves = True

    def gather(
        self,
        members: Mapping[str, nn.Parameter],
        given: Tensors,
        *,
        uphill: bool,
        fill: Callable[[Tensors], Collection[str]] = lambda places: (),
    ) -> Tensors:
        """Bring the gradients by parameter into the banks; one that `given` lacks is zero. `uphill`: with the other
        sign. `fill`: writes other gradients into their places, and says which."""
        in_place = self._moved.in_place(given) if self._moved is not None else frozenset()
        if self._moved is not None and ((uphill and in_place) or self._moved.must_end(in_place)):
            self._moved, self._moves, in_place = None, False, frozenset()
            self._banks = {}
        if not self._banks:
            self._make()
        places = self._places
        filled = fill(places)
        copied = [name for name in given if name not in in_place] if in_place else [*given]
        if copied:
            with torch.no_grad():
                copy_each([*map(places.__getitem__, copied)], [*map(given.__getitem__, copied)])
        if len(given) + len(filled) < len(members):
            clear_each([places[name] for name in members if name not in given and name not in filled])
        if uphill:
            negate_each([*self._banks.values()])
        elif self._moves and self._moved is None:
            self._moved = MovedGradients(members, places)
        return dict(self._banks)

    def _make(self) -> None:
        make = torch.zeros  # what lies between two parameters is zero, and stays it
        self._banks = {b.key: make(b.shape, dtype=b.dtype, device=self._layout.device) for b in self._layout.banks}
        self._places = self._layout.views(self._banks)
        for bank in self._banks.values():
            _compat.mark_static(bank)
