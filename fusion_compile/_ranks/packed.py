"""Small tensors of every rank in one collective: norms, losses, metrics."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_compile._ranks._compat import start_all_gather, wait
from fusion_compile._ranks.groups import Group


def of_every_rank(named: Mapping[str, Tensor], group: Group) -> dict[str, Tensor]:
    """``{name: tensor}`` -> ``{name: [ranks, *shape]}``, in fp64 (complex128), from one all_gather.

    Gathered and not summed: each rank then adds up the same numbers in the same order, so that what they decide is the
    same to the bit, whatever the network adds up in which order. Whole numbers below 2⁵³ stay exact.
    """
    flat = [_real(t).reshape(-1) for t in named.values()]
    table = wait(start_all_gather(torch.cat(flat), group.size, group.name)).view(group.size, -1)
    columns = torch.split(table, [f.numel() for f in flat], dim=1)
    out: dict[str, Tensor] = {}
    for (name, given), column in zip(named.items(), columns, strict=True):
        if given.is_complex():
            out[name] = torch.view_as_complex(column.reshape(group.size, *given.shape, 2))
        else:
            out[name] = column.reshape(group.size, *given.shape)
    return out


def _real(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.view_as_real(tensor.to(torch.complex128))
    return tensor.to(torch.float64)
