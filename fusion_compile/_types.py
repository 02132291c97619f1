"""The nouns shared by all rooms; no torch calls here."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name: by a parameter's full name outside, by a bank's key inside the program."""
