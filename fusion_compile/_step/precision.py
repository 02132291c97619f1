"""Mixed precision: a loss under autocast, and modules in it that stay in fp32.

The model that the loss sees is the model itself, with fp32 weights. Autocast's rules say which operators compute in the
lower precision: products of matrices and convolutions do, softmax, norms and losses do not, and timesteps, conditioning
vectors and buffers keep their values until a product takes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._compat import fast_product_dtype
from fusion_compile._step.containers import map_tensors

DTYPES = (torch.bfloat16, torch.float16)
"""The precisions that autocast computes in."""


class Precision:
    """In what a loss computes.

    Args:
        model: The model of the loss.
        dtype: That of products; None leaves everything in the dtype of the weights.
        device: Of the weights.
        keep_fp32: Regular expressions, searched in full names of modules whose forward computes in fp32.

    Raises ValueError for an expression that matches no module.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None, device: torch.device, keep_fp32: Sequence[str] = ()
    ) -> None:
        self.dtype, self.device_type = dtype, device.type
        self._patterns = tuple(keep_fp32)
        named = [(name, module) for name, module in model.named_modules() if name]
        kept: dict[str, nn.Module] = {}
        for pattern in self._patterns:
            found = {name: module for name, module in named if re.search(pattern, name)}
            if not found:
                raise ValueError(
                    f"keep_fp32: {pattern!r} matches no module of the model; the names look like "
                    f"{', '.join(name for name, _ in named[:3]) or '(there are none)'}."
                )
            kept |= found
        self._called: set[str] = set()
        self._names = tuple(kept)
        self._own = [vars(module).get("forward") for module in kept.values()]
        self._forwards = [(module, self._in_fp32(name, module)) for name, module in kept.items()]

    def notes(self) -> list[str]:
        """What `explain` says of it: a precision that the device has no instructions for is slow."""
        if self.dtype is None or self.dtype == (fast := fast_product_dtype(self.device_type)):
            return []
        name, other = (str(dtype).removeprefix("torch.") for dtype in (self.dtype, fast))
        return [
            f"compute_dtype is {name}, and this {self.device_type} multiplies {other} fast; without instructions for "
            f"{name} its products may be many times slower."
        ]

    def kept(self) -> AbstractContextManager[None]:
        """Inside, the forward of each module that is kept in fp32 leaves autocast and gets fp32 inputs.

        Stay inside until the step is done: a backward calls the forward of a checkpointed region again.
        """
        return self._kept() if self._forwards else nullcontext()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        before = [(module, vars(module).get("forward")) for module, _ in self._forwards]
        for name, (_, now), own in zip(self._names, before, self._own, strict=True):
            if now is not own:
                raise RuntimeError(
                    f"{name}.forward was replaced after compile_training_step(), which keeps the old one in fp32. "
                    f"Replace it before, or compile the step again."
                )
        try:
            for module, in_fp32 in self._forwards:  # the same objects at each step, which a compiler guards
                module.forward = in_fp32
            yield
        finally:
            for module, own in before:
                if own is not None:
                    module.forward = own
                else:
                    vars(module).pop("forward", None)

    def _in_fp32(self, name: str, module: nn.Module) -> Callable[..., Any]:
        device_type, called, own = self.device_type, self._called, vars(module).get("forward")

        def in_fp32(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                called.add(name)
            with torch.autocast(device_type, enabled=False):
                # An object stays itself: the forward may write into it.
                given, named = map_tensors(_widened, args, objects=False), map_tensors(_widened, kwargs, objects=False)
                return type(module).forward(module, *given, **named) if own is None else own(*given, **named)

        return in_fp32

    def refuse_uncalled(self) -> None:
        """Raise ValueError, after the loss ran, for an expression none of whose modules was called."""
        for pattern in self._patterns:
            names = [name for name in self._names if re.search(pattern, name)]
            if not self._called.intersection(names):
                raise ValueError(
                    f"keep_fp32: {pattern!r} matches {', '.join(names[:3])}, whose forward the loss does not call, so "
                    f"nothing would stay in fp32. Name the module whose forward is called."
                )


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in DTYPES else tensor
