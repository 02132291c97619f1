"""Refusals of `explain` name what was got and show the right call."""

from __future__ import annotations

import pytest
from torch import nn

import fusion_compile as fc


def test_what_cannot_be_explained_is_refused_with_what_can() -> None:
    with pytest.raises(TypeError, match="got a int; give what"):
        fc.explain(3)
    with pytest.raises(TypeError, match="Linear without inputs"):
        fc.explain(nn.Linear(2, 2))
