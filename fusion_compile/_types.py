"""The nouns that all rooms share. No torch calls here."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

Tensors: TypeAlias = dict[str, Tensor]
"""Tensors by name: outside a program by parameter name, inside it by bank key."""
