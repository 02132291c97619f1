"""Tests: every rank starts with what the first one has."""

from __future__ import annotations

from typing import Any

import torch


def test_models_of_different_seeds_train_as_one(two_ranks: Any) -> None:
    first, second = two_ranks("divided")  # each rank built its model with its own seed
    assert torch.equal(first["adamw"]["weights"], second["adamw"]["weights"])
