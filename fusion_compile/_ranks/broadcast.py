"""Every rank starts with what the first one has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from fusion_compile._ranks._compat import as_bytes, group_of
from fusion_compile._ranks.groups import Group


def from_the_first(tensors: Iterable[Tensor], group: Group) -> None:
    """Write what the first rank of `group` has into `tensors`, on all of its ranks, bit for bit."""
    found = group_of(group.name)
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.numel():
                continue
            sent = tensor.detach().contiguous()
            dist.broadcast(as_bytes(sent), group.members[0], found)
            if sent.data_ptr() != tensor.data_ptr():
                tensor.copy_(sent)
