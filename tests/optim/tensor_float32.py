"""Products rounded to TensorFloat32, as a GPU may compute them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class TensorFloat32(TorchDispatchMode):
    """Products whose operands are rounded to 10 bits of mantissa, as a GPU does when it may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            bits = [a.contiguous().view(torch.int32) for a in args]
            args = [((b + 0x1000) & ~0x1FFF).view(torch.float32) for b in bits]
        return func(*args, **(kwargs or {}))
