"""What all classes of ``kaon`` share: how a recipe becomes one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusion_compile.optim._kaon_words import form_named, own_words
from fusion_compile.optim._transform import Transform
from fusion_compile.torch_optimizer import Parameters, TorchOptimizer

BLOCK = 128
"""Entries of a block of 4 bits, the source's default."""


class _OfKaon(TorchOptimizer):
    """A class of the source over a recipe."""

    def _begin(
        self, params: Parameters, make: Callable[..., Transform], bf16_method: str, others: Mapping[str, Any]
    ) -> None:
        own: dict[str, Any] = {"mode": None, "backend": "inductor", **own_words(type(self), others)}
        form, released = form_named(bf16_method), bool(own.pop("release_gradients", False))
        super().__init__(params, make, lr=None, force_scalar=(), force_spectral=(), **own)
        self._keep_weights_as(form)
        self._release_gradients(released)
