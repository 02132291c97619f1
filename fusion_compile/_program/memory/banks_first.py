"""Where a bank of gradients begins with its first gradient, and where it waits for the last."""

from __future__ import annotations


def banks_first(device_type: str) -> bool:
    """Whether a device's matrix products are written straight into their places in a bank of gradients.

    On a GPU they are, which saves a launch for each (`products_written_into_concatenations`). On a CPU a launch costs
    nothing, and a bank that begins early is one more set of gradients beside all activations.
    """
    return device_type != "cpu"
