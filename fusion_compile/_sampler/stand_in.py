"""A module that stands in for another: attributes that it lacks are the other's."""

from __future__ import annotations

import dis
import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn


class ForwardOf:
    """Descriptor: the method `_serve` of a `StandIn`, with the signature of the model's own ``forward``.

    An instance may have another ``forward``, as hooks of other libraries put there.
    """

    def __get__(self, stand_in: StandIn | None, owner: type) -> Any:
        if stand_in is None:
            return owner._serve  # type: ignore[attr-defined]

        def forward(*args: Any, **kwargs: Any) -> Any:
            with stand_in._turn:
                return stand_in._serve(*args, **kwargs)

        forward.__signature__ = stand_in._signature  # type: ignore[attr-defined]
        forward.__doc__ = stand_in._serve.__doc__
        return forward


Method = TypeVar("Method", bound=Callable[..., Any])


def in_turn(method: Method) -> Method:
    """`method` of a `StandIn`, run by one thread at a time, without gradients, and on tensors that outlive the caller's
    inference mode."""

    @functools.wraps(method)
    def run(self: StandIn, *args: Any, **kwargs: Any) -> Any:
        with self._turn, torch.inference_mode(False), torch.no_grad():
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


_COMPUTES = frozenset({"apply_model"})
"""Methods that published code calls in the place of ``forward``, and that call a part of the model."""


def calls_the_model(function: Any) -> bool:
    """Whether a method of a model computes what ``forward`` does: it names ``forward``, or calls ``self(…)``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None or not code.co_argcount:
        return False
    if function.__name__ in _COMPUTES or "forward" in code.co_names:
        return True
    loads = [*dis.get_instructions(code)]
    return any(
        one.opname.startswith("LOAD_FAST") and one.argval == code.co_varnames[0] and _is_called(loads, i)
        for i, one in enumerate(loads)
    )


def _is_called(instructions: list[dis.Instruction], i: int) -> bool:
    """Whether instruction `i` loads what is called: torch, and every Python since 3.11, pushes NULL beside it."""
    around = (instructions[i - 1 : i] if i else []) + instructions[i + 1 : i + 2]
    return any(one.opname == "PUSH_NULL" for one in around)


class StandIn(nn.Module):
    """Called as `model` is, with its names for parameters, its state dict and its attributes.

    `model` is a child, so ``to``, ``half``, ``eval`` and ``requires_grad_`` reach it. Reading an attribute that the
    stand-in does not have reads the model's (``config``, ``dtype``, ``device``, ``cache_context``,
    ``save_pretrained``, ``load_lora_adapter``, ...); setting one that only the model has sets the model's. To code that
    asks, it is of the model's class and module, as a pipeline that saves its parts does.

    `method`: the name of the model's method that it stands in for.
    """

    model: nn.Module
    forward = ForwardOf()
    _forwards_attributes = False  # whether attributes are set on the model; True once a subclass has its own

    def __init__(self, model: nn.Module, method: str = "forward") -> None:
        super().__init__()
        self._method = method
        self._signature = inspect.signature(getattr(model, method))
        self.model = model
        self.__dict__["__module__"] = type(model).__module__
        # Rows, requests and a CUDA graph's inputs are one thread's at a time.
        self._turn = threading.RLock()

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The model's class, for `isinstance`."""
        model = self.__dict__.get("_modules", {}).get("model")
        return type(self) if model is None else type(model)

    def _get_name(self) -> str:
        return type(self).__name__

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the result of ``forward``."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == self.__dict__.get("_method"):
                return self.forward
            model = super().__getattr__("model")
            found = getattr(model, name)
            if isinstance(found, types.MethodType) and found.__self__ is model and calls_the_model(found.__func__):
                return self._telling(found)
            return found

    def _telling(self, method: types.MethodType) -> Any:
        """`method` of the model, which says that nothing in it is hoisted when it runs on tensors."""

        @functools.wraps(method)
        def tell(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                self._runs_unhoisted(method.__name__)
            return method(*args, **kwargs)

        return tell

    def _runs_unhoisted(self, name: str) -> None:
        """Called before the model's own method `name`, which calls the model."""

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
