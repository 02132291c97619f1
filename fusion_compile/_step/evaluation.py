"""The loss in evaluation mode, without gradients: one program for each kind of batch, beside the step's own."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fusion_compile._capture.by_running.leaves import parameters_are_leaves
from fusion_compile._capture.rehearsal.contents import as_it_was
from fusion_compile._capture.rehearsal.random_states import RandomStates
from fusion_compile._capture.rehearsal.rehearsal import Rehearsal, rehearse, run_once
from fusion_compile._capture.watch.late_hooks import LateHooks
from fusion_compile._program._compat import random_numbers_are_torchs
from fusion_compile._program.lower import without_cuda_graph
from fusion_compile._program.program import Program, refuse_host_syncs
from fusion_compile._program.programs import Programs
from fusion_compile._shared_memory import parts_in, sharing
from fusion_compile._state.kept_average import parameters_of
from fusion_compile._step import batches
from fusion_compile._step.arrays import from_numpy_takes_tensors
from fusion_compile._step.containers import map_tensors
from fusion_compile._step.loss import LossFn, LossModule
from fusion_compile._step.methods import Methods
from fusion_compile._step.notices import Notices
from fusion_compile._step.proof import ROOM, is_near
from fusion_compile._step.pure_step import StepPlan
from fusion_compile._step.way import refuse_iterators
from fusion_compile._types import Tensors

Looked: TypeAlias = tuple[batches.Signature, tuple[torch.dtype, ...]]
LOOKS = 3
"""So often a loss that leaves something behind is looked at again: caches that training fills are then full."""


class Evaluation:
    """Evaluate a loss with any weights, and leave everything as it was.

    The first batch is computed in the ordinary way, too, which shows what the loss leaves behind and proves the
    program. A loss that leaves something behind in evaluation mode, or that cannot be captured, runs as Python at each
    call, and what it left is put back.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, plan: StepPlan, *, mode: str) -> None:
        self._model, self._loss_fn, self._plan = model, loss_fn, plan
        self._mode, self._most = without_cuda_graph(mode), plan.options.max_shapes
        self._roots = {"model": model, "loss_fn": loss_fn}
        self._programs = Programs(plan.options.backend)
        self._watches: dict[Any, tuple[Methods, LateHooks]] = {}
        self._looks: dict[Looked, int] = {}
        """How often a kind of batch was looked at and left something behind; 0: it leaves nothing."""
        self._not_captured: set[Any] = set()
        self.notices = Notices()

    @property
    def programs(self) -> list[Program]:
        """The captured programs, in order."""
        return list(self._programs.captured.values())

    def forget(self) -> None:
        """Drop all programs."""
        self._programs.forget()
        self._watches.clear()
        self._looks.clear()
        self._not_captured.clear()

    def run(self, banks: Tensors, batch: tuple[Any, ...], seed: int) -> Tensors:
        """Loss (under ``"loss"``) and metrics of `batch` with the weights in `banks`. All random numbers are drawn from
        generators seeded with `seed`, which are then as before."""
        device = self._plan.whole.device
        batch, _ = batches.taken(batch, device)
        looked = batches.signature(batch, device), tuple(bank.dtype for bank in banks.values())
        key = batches.signature(batch, device, fixed=True), looked[1]
        with self._evaluating(device), from_numpy_takes_tensors():  # whoever has converted them
            return self._run(banks, batch, looked, key, seed)

    def _run(self, banks: Tensors, batch: tuple[Any, ...], looked: Looked, key: Any, seed: int) -> Tensors:
        seed_all(seed)
        if 0 < self._looks.get(looked, 1) < LOOKS:
            result = self._look(banks, batch, looked)
            # A later shape is captured when it comes back: the last batch of a loader comes once.
            if self._looks[looked] or self._mode == "eager" or self._watches:
                return result
            return self._compiled(banks, batch, key, seed, result)
        if self._looks[looked]:
            return self._put_back_after(banks, batch)
        if key in self._programs:
            try:
                for watch in self._watches[key]:
                    watch.check()
                found: Tensors = self._programs.get(key)(banks, batch)  # type: ignore[misc]
                return found
            except RuntimeError:  # what it was captured for has changed: a hook, a method, a flag
                self._programs.drop(key)
                del self._watches[key], self._looks[looked]
                return self._run(banks, batch, looked, key, seed)
        full = len(self._programs) >= self._most
        if self._mode == "eager" or key in self._not_captured or full:
            if full:
                self.notices.warn("many", f"more than {self._most} kinds of batches are evaluated uncaptured.")
            return self._plain(banks, batch)
        return self._compiled(banks, batch, key, seed, self._plain(banks, batch))

    # ------------------------------------------------------------------ in the ordinary way

    def _look(self, banks: Tensors, batch: tuple[Any, ...], looked: Looked) -> Tensors:
        """The result of a real run, and what such runs leave behind."""
        strays: list[str] = []
        given, weights, buffers = self._copies(banks, batch)

        def run() -> Tensors:
            return self._loss(given, weights, buffers, strays)

        roots = self._roots
        seen = rehearse(roots, run, batches.tensors(given), [*weights.values(), *buffers.values()])
        refuse_iterators(seen.not_put_back)
        found: Tensors = seen.results[0]
        self._looks[looked] = self._looks.get(looked, 0) + 1 if _leaves_something(seen) or strays else 0
        return found

    def _put_back_after(self, banks: Tensors, batch: tuple[Any, ...]) -> Tensors:
        given, weights, buffers = self._copies(banks, batch)
        every = [*weights.values(), *buffers.values()]
        found: Tensors = run_once(
            self._roots, lambda: self._loss(given, weights, buffers, []), batches.tensors(given), every
        )
        return found

    def _plain(self, banks: Tensors, batch: tuple[Any, ...]) -> Tensors:
        return self._loss(*self._copies(banks, batch), [])

    def _copies(self, banks: Tensors, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensors, Tensors]:
        """Batch, weights and buffers that the loss may write."""
        weights = {n: w.clone() for n, w in self._plan.whole.views(banks).items()}
        own = dict(self._model.named_buffers())
        buffers = sharing(own, {n: b.clone() for n, b in own.items()}, parts_in(own))
        return map_tensors(batches.clone, batch), weights, buffers

    def _loss(self, batch: tuple[Any, ...], weights: Tensors, buffers: Tensors, strays: list[str]) -> Tensors:
        """`strays`: gets the names of what the loss reads where it keeps it outside of the model."""
        module = LossModule(self._model, self._loss_fn, (), self._plan.precision)
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        averages = parameters_of(self._plan.options.averages)
        held = {**weights, **buffers, **{n: a.detach() for n, a in averages.items()}}
        with module.holding(weights, buffers), parameters_are_leaves(held, {**own, **averages}) as stray:
            value, metrics, _ = module.forward(*batch)
        strays += [name for name, tensor in own.items() if id(tensor) in stray.handed]
        return checked(value, metrics)

    # ------------------------------------------------------------------ as a program

    def _compiled(self, banks: Tensors, batch: tuple[Any, ...], key: Any, seed: int, wanted: Tensors) -> Tensors:
        """Compile, and give what the program computes; `wanted` where it cannot be captured or is another's."""
        layout, module = self._plan.whole, LossModule(self._model, self._loss_fn, (), self._plan.precision)
        names = [name for name, _ in self._model.named_buffers()]
        parts = parts_in(dict(self._model.named_buffers()))

        def evaluate(banks: Tensors, batch: tuple[Any, ...]) -> Tensors:
            own = {name: module.model.get_buffer(name) for name in names}
            buffers = sharing(own, {name: buffer.clone() for name, buffer in own.items()}, parts)
            with module.holding(layout.views(banks), buffers):
                value, metrics, _ = module.forward(*batch)
            return {"loss": value, **metrics}

        check = partial(_check, on_cpu=layout.device.type == "cpu")
        seed_all(seed)
        try:
            with as_it_was(self._roots), random_numbers_are_torchs():
                found: Tensors = self._programs.compile(
                    key, evaluate, banks, batch, mode=self._mode, what="the evaluation", check=check
                )
        except Exception as error:  # of any kind: the loss has just run as it is
            self._runs_as_python(key, f"it cannot be captured ({type(error).__name__}: {str(error).strip()})")
            return wanted
        if apart := _differs(found, wanted):
            self._programs.drop(key)
            self._runs_as_python(key, f"its program has another {apart} than the ordinary loop")
            return wanted
        self._watches[key] = Methods((), self._model), LateHooks(self._roots)
        return found

    def _runs_as_python(self, key: Any, because: str) -> None:
        self._not_captured.add(key)
        first, *more = because.splitlines()
        said = first if not more else f"{first} …)"
        self.notices.warn("uncaptured", f"evaluate() runs the loss as Python at each call, because {said}.")

    # ------------------------------------------------------------------ around each call

    @contextlib.contextmanager
    def _evaluating(self, device: torch.device) -> Iterator[None]:
        """Inside, every module is in evaluation mode, nothing has a gradient, and random numbers are put back."""
        roots = [root for root in self._roots.values() if isinstance(root, nn.Module)]
        training = [module for root in roots for module in root.modules() if module.training]
        states = RandomStates()
        with torch.inference_mode(False), torch.no_grad(), self._plan.precision.kept():
            try:
                for module in training:  # the flag alone: a train() of the user's may do more than it undoes
                    module.training = False
                yield
            finally:
                for module in training:
                    module.training = True
                states.restore()


def seed_all(seed: int) -> None:
    """Seed the generators of torch, Python and numpy; of devices those that are in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def checked(value: Any, metrics: Any) -> Tensors:
    """Loss and metrics in one dictionary. Raises TypeError or ValueError for what is neither."""
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise ValueError(f"loss_fn returned a loss of {got} in evaluation mode; return a 0-dim tensor.")
    if not isinstance(metrics, dict) or not all(isinstance(v, Tensor) for v in metrics.values()):
        raise TypeError("loss_fn's second result must be a dictionary of tensors, {name: tensor}.")
    return {"loss": value, **metrics}


def _check(program: Program, *, on_cpu: bool) -> None:
    refuse_host_syncs(program.findings(thorough=False), on_cpu=on_cpu)


def _leaves_something(seen: Rehearsal) -> bool:
    moved = [label for label in seen.moved_generators if not label.startswith("torch's generator of")]
    return bool(seen.left or seen.written_inputs or moved or seen.once)


def _differs(found: Tensors, wanted: Tensors) -> str:
    """The name of the first number that rounding does not explain; empty if there is none."""
    half = any(t.dtype in (torch.float16, torch.bfloat16) for t in wanted.values())
    if found.keys() != wanted.keys():
        return "set of metrics"
    near = (n for n, t in wanted.items() if found[n].shape != t.shape or not is_near(found[n], t, ROOM[half]))
    return next(near, "")
