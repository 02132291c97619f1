"""Private torch API of this room, behind feature probes. torch 2.11 to 2.15."""

from __future__ import annotations

from torch.utils.hooks import RemovableHandle


def hooks_registered() -> int:
    """How many hooks of any kind were ever registered through torch's functions; -1 at all times where torch does not
    count them."""
    count = getattr(RemovableHandle, "next_id", -1)
    return count if isinstance(count, int) else -1
