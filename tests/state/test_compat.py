"""Who else holds a tensor's memory."""

from __future__ import annotations

import torch
from torch import nn

from fusion_compile._state._compat import others_hold


def test_a_view_or_a_detached_tensor_holds_the_memory_too() -> None:
    parameter = nn.Parameter(torch.zeros(4))
    assert not others_hold(parameter)
    kept = parameter.data
    assert others_hold(parameter) and not others_hold(parameter, known=1)
    del kept
    view = parameter[:2]
    assert others_hold(parameter) and view.numel() == 2
