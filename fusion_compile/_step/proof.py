"""The first two steps of a program against the ordinary loop: loss, gradient norm and buffers, and the step undone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fusion_compile._state import keys
from fusion_compile._step.loss_scale import SCALE
from fusion_compile._step.rehearsed import Outcome
from fusion_compile._types import Tensors

_HALF = (torch.float16, torch.bfloat16)
ROOM = {False: 2e-3, True: 5e-2}
"""Relative difference that a compiler's rounding may make, in fp32 and in half precision. A fault is as large as the
term that was lost; a smaller term goes unseen."""
_NO_ROUNDING = 0.5
"""Relative difference of the gradient's norm that no compiler's rounding makes, where the graph itself is right."""


class Proof:
    """What the ordinary loop computes on a batch, and the state before the step.

    Args:
        wanted: The outcome of a real run.
        state: The flat state. Its tensors are copied, to the CPU where they lie on another device: the copy lives until
            the first step is done.
        dtypes: Of everything that the loss and its gradient compute.
    """

    def __init__(self, wanted: Outcome, state: Tensors, dtypes: Collection[torch.dtype]) -> None:
        self._wanted = wanted
        self._room = ROOM[any(dtype in _HALF for dtype in dtypes)]
        self._before = {key: _copy(tensor) for key, tensor in state.items()}
        has_cuda = any(tensor.is_cuda for tensor in state.values())
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state_all() if has_cuda else []

    def objection(self, state: Tensors) -> str:
        """In words, the first number that is not the ordinary loop's; empty if there is none."""
        pairs = {
            "loss": (state[keys.metrics("loss")], self._wanted.loss),
            "gradient norm": (state[keys.metrics("grad_norm")], self._wanted.grad_norm),
        }
        if not self._was_skipped(state):  # a skipped step gives buffers back, which the ordinary loop does not
            pairs |= {
                f"buffer {name}": (state[keys.buffers(name)], value)
                for name, value in self._wanted.buffers.items()
                if keys.buffers(name) in state and state[keys.buffers(name)].shape == value.shape
            }
        if SCALE in state and not all(bool(norm.isfinite()) for norm in pairs["gradient norm"]):
            del pairs["gradient norm"]  # at the edge of fp16 rounding decides what overflows, and the scale backs off
        for name, (got, wanted) in pairs.items():
            if not is_near(got, wanted, self._room):
                return f"its {name} is {_shown(got)} where the ordinary loop has {_shown(wanted)}"
        return ""

    def is_no_rounding(self, state: Tensors) -> bool:
        """Whether the gradient's norm is so far from the ordinary loop's that the step was compiled wrongly, and does
        not only round otherwise. The loss does not tell: a difference of large terms may be all rounding."""
        got, wanted = state[keys.metrics("grad_norm")], self._wanted.grad_norm
        return SCALE not in state and not is_near(got, wanted, _NO_ROUNDING)

    def objection_when_read(self, state: Tensors) -> str:
        """`objection`, and that the step leaves the random numbers elsewhere: where a draw is used by nothing, Dynamo
        leaves it out, and what is drawn afterwards is then another."""
        if objection := self.objection(state):
            return objection
        if self._wanted.random is not None and not torch.equal(self._wanted.random, torch.get_rng_state()):
            return "it draws more or fewer random numbers than the ordinary loop"
        return ""

    def undo(self, state: Tensors) -> None:
        """Put the state and the random numbers back to before the step."""
        with torch.no_grad():
            for key in [key for key in state if key not in self._before]:
                del state[key]
            for key, tensor in self._before.items():
                state[key].copy_(tensor)
        torch.set_rng_state(self._random[0])
        if self._random[1]:
            torch.cuda.set_rng_state_all(self._random[1])

    def _was_skipped(self, state: Tensors) -> bool:
        key = keys.counts("skipped")
        return key in self._before and int(state[key]) != int(self._before[key])


def is_near(got: Tensor, wanted: Tensor, room: float) -> bool:
    """Whether `got` is `wanted` up to rounding: `room`, relative to its largest entry."""
    a, b = got.detach().double(), wanted.detach().to(got.device).double()
    if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
        return bool(torch.equal(torch.isfinite(a), torch.isfinite(b)))
    scale = float(b.abs().max()) if b.numel() else 0.0
    return float((a - b).abs().max() if b.numel() else 0.0) <= room * max(scale, 1e-6)


class Compared(NamedTuple):
    """A step that was compared with the ordinary loop.

    Attributes:
        fresh: The entries that the state did not have.
        objection: In what it is not the ordinary loop's. The step is then undone.
        rounding: In what the compiled step differs, where the captured graph agrees if it is not compiled. The step is
            taken.
    """

    fresh: Tensors
    objection: str = ""
    rounding: str = ""


def take_compared(
    state: Tensors,
    proof: Proof,
    compiled: Callable[[], Tensors],
    uncompiled: Callable[[], object] | None,
    *,
    draws_apart: bool,
    alone: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> Compared:
    """Take one step of `state` in place and compare it with the ordinary loop.

    Args:
        state: The flat state.
        proof: What is wanted, with a copy of the state.
        compiled: The step.
        uncompiled: The captured graph, operator by operator; None where there is none.
        draws_apart: Whether the compiled step draws other random numbers than the ordinary loop. Then the captured
            graph is compared in its place; without one, nothing is.
        alone: With ranks, inside of what nothing is sent. The step is then compared there and undone, before it is
            taken with the others, who must not wait for a step that is refused.
    """
    if alone is not None:
        with alone():
            found = _compared_alone(state, proof, compiled, uncompiled, draws_apart)
        return found if found.objection else found._replace(fresh=compiled())
    if draws_apart:
        if uncompiled is not None and (objection := _of_uncompiled(state, proof, uncompiled)):
            return Compared({}, objection)
        return Compared(compiled())
    fresh = compiled()
    if not (objection := proof.objection(state)):
        return Compared(fresh)
    wrong = proof.is_no_rounding(state)
    proof.undo(state)
    if uncompiled is None or _of_uncompiled(state, proof, uncompiled):
        return Compared({}, objection)
    return Compared({}, f"{objection}{_COMPILED_WRONGLY}") if wrong else Compared(compiled(), rounding=objection)


def _compared_alone(
    state: Tensors,
    proof: Proof,
    compiled: Callable[[], Tensors],
    uncompiled: Callable[[], object] | None,
    draws_apart: bool,
) -> Compared:
    """`take_compared` without a step that is taken."""
    of_graph = partial(_of_uncompiled, state, proof)
    if draws_apart:
        return Compared({}, "" if uncompiled is None else of_graph(uncompiled))
    wrong: list[bool] = []

    def compiled_and_seen() -> None:
        compiled()
        wrong.append(proof.is_no_rounding(state))

    objection = of_graph(compiled_and_seen)
    if not objection or uncompiled is None or of_graph(uncompiled):
        return Compared({}, objection)
    return Compared({}, f"{objection}{_COMPILED_WRONGLY}") if wrong[0] else Compared({}, rounding=objection)


_COMPILED_WRONGLY = ", though its graph, operator by operator, has the ordinary loop's, so the compiler made an error"


def _of_uncompiled(state: Tensors, proof: Proof, uncompiled: Callable[[], object]) -> str:
    """The objection to the captured graph; the state is put back. Empty where there is no memory for it."""
    try:
        uncompiled()
        return proof.objection(state)
    except torch.OutOfMemoryError:
        return ""
    finally:
        proof.undo(state)


def not_the_loops_uncaptured(objection: str) -> str:
    """The refusal of a step that runs as Python and computes something else than the ordinary loop."""
    return (
        f"the step is not the ordinary loop's, though it runs uncaptured: {objection}. Nothing was changed. Tensors "
        f"that the loss keeps and that share memory (a view beside its base) do this: keep one and take the view in "
        f"the loss."
    )


def not_the_loops(objection: str) -> str:
    """The refusal of a step whose numbers are not the ordinary loop's."""
    return (
        f"the captured step is not the ordinary loop's: {objection}. Nothing was changed. mode='eager' runs the loss "
        f"as it is; please report the model."
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _shown(tensor: Tensor) -> str:
    value = float(tensor.detach().double().norm()) if tensor.ndim else float(tensor)
    text = "not a number" if math.isnan(value) else f"{value:.6g}"
    return f"of norm {text}" if tensor.ndim else text
