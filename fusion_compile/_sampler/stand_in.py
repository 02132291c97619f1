"""A module that stands in for another: attributes that it lacks are the other's."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


class ForwardOf:
    """Descriptor: the method `_serve` of a `StandIn`, with the signature of the model's own ``forward``.

    An instance may have another ``forward``, as hooks of other libraries put there.
    """

    def __get__(self, stand_in: StandIn | None, owner: type) -> Any:
        if stand_in is None:
            return owner._serve  # type: ignore[attr-defined]

        def forward(*args: Any, **kwargs: Any) -> Any:
            return stand_in._serve(*args, **kwargs)

        forward.__signature__ = stand_in._signature  # type: ignore[attr-defined]
        forward.__doc__ = stand_in._serve.__doc__
        return forward


class StandIn(nn.Module):
    """Called as `model` is, with its names for parameters, its state dict and its attributes.

    `model` is a child, so ``to``, ``half``, ``eval`` and ``requires_grad_`` reach it. Reading an attribute that the
    stand-in does not have reads the model's (``config``, ``dtype``, ``device``, ``cache_context``,
    ``save_pretrained``, ``load_lora_adapter``, ...); setting one that only the model has sets the model's.
    """

    model: nn.Module
    forward = ForwardOf()
    _forwards_attributes = False  # whether attributes are set on the model; True once a subclass has its own

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._signature = inspect.signature(model.forward)
        self.model = model

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the result of ``forward``."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        forwards = self._forwards_attributes and name not in self.__dict__ and name not in self._modules
        if forwards and not hasattr(type(self), name) and hasattr(self.model, name):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's state dict."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state dict into the model."""
        return self.model.load_state_dict(state_dict, strict=strict, assign=assign)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Iterate over the model's parameters, under its names."""
        return self.model.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the model's buffers, under its names."""
        return self.model.named_buffers(prefix, recurse, remove_duplicate)
