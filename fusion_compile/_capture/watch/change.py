"""A change that a watch noticed, and the sentence about it."""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fusion_compile._capture.python_state.alike import PLAIN
from fusion_compile._capture.python_state.slots import MISSING

Kind = Literal["value", "length", "tensor", "setting"]


class Described(str):
    """A description in the place of a value that is not kept."""


@dataclass(frozen=True)
class Change:
    """One difference between what was captured and what stands there now.

    Attributes:
        label: The full name: ``model.blocks.0.drop.p``, ``CFG.kl``, ``torch.get_default_dtype()``.
        before: The value at capture; MISSING if there was none.
        after: The value now; MISSING if there is none.
        kind: "value"; "length" of a long container; "tensor": requires_grad, shape, dtype or device; "setting" of
            torch.
        late: Calls at which this could have been noticed earlier, at most; 0 for what is compared at each call.
        read: Whether code that ran names it. False: only code that computes names can have read it.
        tensors: Full name -> the new tensor, if nothing but parameters and buffers of modules were replaced, each by
            one of its own dtype, device, shape and strides, and those that were one tensor by one; otherwise None.
    """

    label: str
    before: Any
    after: Any
    kind: Kind = "value"
    late: int = 0
    read: bool = True
    tensors: dict[str, Tensor] | None = field(default=None, compare=False)

    def sentence(self, recapture: str = "step.recapture()") -> str:
        """What changed, from what to what, and what to do. `recapture`: the call that captures again."""
        return " ".join(filter(None, (self.fact(), self._lateness(), self._remedy(recapture))))

    def fact(self) -> str:
        """What changed, from what to what."""
        if self.before is MISSING:
            return f"{self.label} is {shown(self.after)} now and did not exist when the program was captured."
        if self.after is MISSING:
            return f"{self.label} was {shown(self.before)} when the program was captured and is gone now."
        before, after = shown(self.before), shown(self.after)
        if before == after:
            after = f"another {after.removeprefix('a ')}"
        return f"{self.label} was {before} when the program was captured and is {after} now."

    def _lateness(self) -> str:
        if not self.late:
            return ""
        steps = "step" if self.late == 1 else "steps"
        return f"It is compared in turns: up to {self.late} {steps} may have run without the change."

    def _remedy(self, recapture: str) -> str:
        if self.kind == "setting":
            return f"Call with the same setting, or call `{recapture}` after changing it."
        if isinstance(self.after, Tensor) and isinstance(self.before, Tensor):
            return f"Write into the old tensor with copy_(), or call `{recapture}` after replacing it."
        if _is_number(self.before) and _is_number(self.after):
            return (
                "If it should change between calls, make it a 0-dim tensor and write it with fill_(), or make it a "
                f"hyperparameter; otherwise call `{recapture}` after changing it."
            )
        return f"Change it before the capture, or call `{recapture}` after changing it."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, complex)) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A short description that never runs a user's ``__repr__``."""
    if isinstance(value, Described):
        return str(value)
    if value is MISSING or isinstance(value, PLAIN):
        text = repr(value)
    elif isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype} on {value.device}"
    elif isinstance(value, (types.FunctionType, types.MethodType, type)):
        return f"{value.__qualname__}"
    elif isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    elif type(value) in (list, tuple, set, frozenset, dict, collections.deque):
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        if len(inner) > 12 or not all(isinstance(v, PLAIN) for v in inner):
            return f"a {type(value).__name__} of {len(value)}"
        text = repr(set(value)) if isinstance(value, frozenset) else repr(value)
    else:
        return f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
