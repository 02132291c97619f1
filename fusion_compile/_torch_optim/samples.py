"""Some entries of every parameter, kept to notice that somebody wrote it where no version tells.

A write through ``.data`` (an initialization, a clamp, a rescaling) leaves no trace but the numbers. Comparing all of
them in every step would read the weights once more. A few entries of each tell a write of the whole parameter, or of a
part of it that is not tiny, and cost some microseconds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusion_compile._state.banks import Bank

EACH = 64
"""Entries of a parameter. Of a write to a tenth of its entries they miss (9/10)⁶⁴, one in 850."""


class Samples:
    """Entries of parameters in banks, at places that are drawn once: a regular pattern would fit a column's.

    `banks`: each with the tensor that holds its parameters, in one piece of memory.
    """

    def __init__(self, banks: list[tuple[Bank, Tensor]]) -> None:
        self._tensors = [(tensor, _indices(bank, tensor)) for bank, tensor in banks]
        self._noted: list[Tensor] = []

    def note(self) -> None:
        """Remember the entries as they are now."""
        self._noted = self._now()

    def differ(self) -> Tensor | None:
        """Whether an entry has other bits than at `note`, as a 0-dim bool on the device; None before the first."""
        if not self._noted:
            return None
        pairs = zip(self._noted, self._now(), strict=True)
        return torch.stack([(a.view(torch.uint8) != b.view(torch.uint8)).any() for a, b in pairs]).any()

    def _now(self) -> list[Tensor]:
        return [tensor.view(-1).index_select(0, indices) for tensor, indices in self._tensors]


def _indices(bank: Bank, tensor: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)  # the user's stream does not move
    each = 1 if bank.matrix is None else bank.matrix[0] * bank.matrix[1]
    drawn = []
    for place in bank.places:
        few = place.numel <= EACH
        at = torch.arange(place.numel) if few else torch.randint(place.numel, (EACH,), generator=generator)
        drawn.append(at + place.at * each)
    return torch.cat(drawn).to(tensor.device)
