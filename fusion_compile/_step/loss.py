"""The user's loss as a pure function, and its examination on fake tensors before anything is compiled."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._capture.by_running.leaves import parameters_are_leaves, tagged
from fusion_compile._capture.by_running.settled_coins import SettledCoins
from fusion_compile._capture.by_running.trace import no_checkpoint_is_reentrant
from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.real_writes import RealWritesPutBack
from fusion_compile._capture.rehearsal.rehearsal import run_once
from fusion_compile._shared_memory import parts_in, sharing, whole_of
from fusion_compile._step import batches
from fusion_compile._step._compat import MemorySeen, StatisticsSeen, WritesSeen
from fusion_compile._step.batch_numbers import BatchNumbers
from fusion_compile._step.carried import Carried
from fusion_compile._step.containers import map_tensors
from fusion_compile._step.gradients import gradients
from fusion_compile._step.host_reads import HostRead, RefuseHostReads, host_read_message, not_on_fakes_message
from fusion_compile._step.learnable import leaves_of, refuse_learnable
from fusion_compile._step.precision import Precision
from fusion_compile._step.way import refuse_iterators
from fusion_compile._types import Tensors

LossFn = Callable[..., Any]
"""``(model, *batch) -> loss`` or ``(loss, {name: metric})``."""


class LossModule(nn.Module):
    """Model and loss as one module, so that the loss can run with any weights.

    Its forward returns loss, metrics and the values that the tracked buffers have after the loss. Call ``forward``:
    hooks on all modules are not for this one, which the user does not know. `numbers`: what stands in the place of the
    batch's Python numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        tracked: tuple[str, ...] = (),
        precision: Precision | None = None,
        numbers: BatchNumbers | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._loss_fn = loss_fn
        self._tracked = tracked
        self._precision = precision
        self._numbers = numbers

    def forward(self, *batch: Any) -> tuple[Tensor, dict[str, Tensor], Tensors]:
        if self._numbers is not None:
            batch = self._numbers.put(batch)
        if self._precision is None or self._precision.dtype is None:
            out = self._loss_fn(self.model, *batch)
        else:
            # Without autocast's cache: a capture has none, so that a weight used twice adds its gradients in fp32 in
            # every mode, and a weight that the forward writes is not remembered as it was.
            with torch.autocast(self._precision.device_type, self._precision.dtype, cache_enabled=False):
                out = self._loss_fn(self.model, *batch)
        loss, metrics = out if isinstance(out, tuple) else (out, {})
        return loss, metrics, {name: self.model.get_buffer(name) for name in self._tracked}

    def holding(
        self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Inside, `weights` and `buffers` are in the places of the model's own.

        Stay inside until the backward is done: what a backward computes again, it reads from the model.
        """
        return _compat.holding(self, {f"model.{name}": t for name, t in (*weights.items(), *buffers.items())})


_HOST_READS: tuple[type[Exception], ...] = (HostRead, *_compat.DATA_DEPENDENT)


@dataclass(frozen=True)
class LossFacts:
    """What a loss does: shapes and dtypes of its metrics, parameters it never reads, buffers it changes, parameters
    that it writes itself, those of them into which it puts another tensor (``.data = …``), and the buffers that it
    replaces by another tensor (``self.mean = …``)."""

    metrics: dict[str, tuple[tuple[int, ...], torch.dtype]]
    unused: tuple[str, ...]
    changed_buffers: tuple[str, ...]
    written: tuple[str, ...] = ()
    rebound: tuple[str, ...] = ()
    assigned: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    """Of those, the ones that are of another size or dtype then."""
    saved: int = 0
    """Bytes that the forward leaves to the backward, without the weights."""

    def difference(self, other: LossFacts) -> str:
        """The first difference from `other`, in words."""
        if odd := self._other_metrics(other):
            (now, kind), (then, former) = self.metrics[odd[0]], other.metrics[odd[0]]
            said = "a captured step keeps one shape and dtype for each metric: return a number, or another name"
            return f"returns the metric {odd[0]!r} as {list(now)} {kind}, before as {list(then)} {former} ({said})"
        return f"leaves unread {list(self.unused)}, before {list(other.unused)}"

    def _other_metrics(self, other: LossFacts) -> list[str]:
        return [n for n, what in self.metrics.items() if other.metrics.get(n, what) != what]

    def joined(self, other: LossFacts | None, *, any_metrics: bool = False, any_unread: bool = False) -> LossFacts:
        """These facts with what either changes, writes or returns: what a loss leaves alone passes through a step.

        `any_metrics`: a metric may have another shape or dtype. `any_unread`: other parameters may be unread. Raises
        ValueError, the first difference in words, if anything else differs.
        """
        if other is None:
            return self
        if (self.unused != other.unused and not any_unread) or (self._other_metrics(other) and not any_metrics):
            raise ValueError(self.difference(other))
        more = tuple(name for name in self.changed_buffers if name not in other.changed_buffers)
        wrote = tuple(name for name in self.written if name not in other.written)
        put = tuple(name for name in self.assigned if name not in other.assigned)
        return replace(
            other,
            metrics={**other.metrics, **self.metrics},
            changed_buffers=other.changed_buffers + more,
            written=other.written + wrote,
            assigned=other.assigned + put,
            reshaped=self.reshaped,
            saved=self.saved,
            unused=self.unused,
        )


class NotOnFakes(ValueError):
    """The loss does not run on tensors without data, on which every capture runs it."""


def examine(
    model: nn.Module,
    loss_fn: LossFn,
    weights: Mapping[str, Tensor],
    batch: tuple[Any, ...],
    precision: Precision | None,
    carried: Carried,
    *,
    rehearsed: bool = True,
    uncaptured: bool = False,
) -> LossFacts:
    """Run the loss once on fake tensors and report what it does. It costs no memory and draws no random number.

    Everything that the loss leaves behind is put back: a tensor of this run has no data.

    `weights`: trainable parameters by name. A loss that is not a scalar, that does not depend on the weights, or that
    reads a value on the CPU is a TypeError or ValueError that names the user's line. `rehearsed`: whether real runs
    have looked for learnable tensors outside of the model; if not, this run does. `uncaptured`: whether Python runs at
    every step. A loss that needs values then runs on clones instead, for real.
    """
    roots = {"model": model, "loss_fn": loss_fn}
    looked = _Looked(model, loss_fn, weights, batch, precision, carried)
    contents, real = Contents(roots), RealWritesPutBack()
    try:
        found = _examine_fakes(looked, real)
    except NotOnFakes as error:
        if not uncaptured:
            raise ValueError(str(error)) from error.__cause__
        found = None
    finally:
        contents.restore()
        real.put_back()
    facts, others = found or _examine_clones(looked, roots)
    refuse_iterators(contents.not_put_back())
    if not rehearsed:
        refuse_learnable(others, roots, ())
    return facts


class _Looked(NamedTuple):
    """What is examined: the arguments of `examine`."""

    model: nn.Module
    loss_fn: LossFn
    weights: Mapping[str, Tensor]
    batch: tuple[Any, ...]
    precision: Precision | None
    carried: Carried


def _examine_fakes(looked: _Looked, real: RealWritesPutBack) -> tuple[LossFacts, list[Tensor]]:
    """The facts, and the leaves on which the loss depends besides the weights, from tensors without data."""
    device = next(p.device for p in looked.model.parameters() if p.requires_grad)  # weights may lie elsewhere in part
    with (
        _compat.shapes_as_the_kernels_have_them(),
        _compat.distributions_check_nothing(),
        _compat.fake_mode() as mode,
    ):

        def fake(t: Tensor) -> Tensor:
            faked: Tensor = mode.from_tensor(t.detach())
            return faked

        def blank(w: Tensor) -> Tensor:
            # In memory of its own, unlike the views of a bank: a write must be told from its neighbour's.
            return torch.empty_strided(w.shape, w.stride(), dtype=w.dtype, device=device)

        return _examine(looked, fake, blank, _on_fakes(real))


@contextlib.contextmanager
def _on_fakes(real: RealWritesPutBack) -> Iterator[None]:
    """Inside, what needs a value, or fails for another reason, raises `NotOnFakes` with the user's line."""
    try:
        with real, RefuseHostReads(), SettledCoins():
            yield
    except _HOST_READS as error:
        raise NotOnFakes(host_read_message(traceback.extract_tb(error.__traceback__), str(error))) from None
    except Exception as error:  # of any kind: the loss itself has run before, on real tensors
        raise NotOnFakes(not_on_fakes_message(error)) from error


def _examine_clones(looked: _Looked, roots: Mapping[str, Any]) -> tuple[LossFacts, list[Tensor]]:
    """The same from clones, and nothing of that run is left."""
    found: list[tuple[LossFacts, list[Tensor]]] = []

    def clone(t: Tensor) -> Tensor:
        return batches.clone(t)

    def run() -> None:
        found.append(_examine(looked, clone, clone, contextlib.nullcontext()))

    run_once(roots, run, batches.tensors(looked.batch))
    return found[0]


def _examine(
    looked: _Looked,
    copy: Callable[[Tensor], Tensor],
    weight: Callable[[Tensor], Tensor],
    within: contextlib.AbstractContextManager[None],
) -> tuple[LossFacts, list[Tensor]]:
    """Run the loss inside of `within` on what `copy` makes of batch, buffers and what is carried, and `weight` of the
    weights."""
    model, loss_fn, weights, batch, precision, carried = looked
    every_buffer, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    module = LossModule(model, loss_fn, tuple(every_buffer), precision)
    leaves = {n: tagged(weight(w), parameters[n]) for n, w in weights.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    memory = {n: leaf.untyped_storage()._cdata for n, leaf in leaves.items()}
    buffers = sharing(every_buffer, {n: copy(b) for n, b in every_buffer.items()}, parts_in(every_buffer))
    versions = {n: b._version for n, b in buffers.items()}
    held = {path: copy(t) for path, t in carried.tensors().items()}
    with (
        torch.enable_grad(),
        torch.autograd.set_detect_anomaly(False),
        within,
        no_checkpoint_is_reentrant(),
        StatisticsSeen() as seen,
        WritesSeen() as writes,
        module.holding(leaves, buffers),
        parameters_are_leaves({**leaves, **buffers}, {**parameters, **every_buffer}),
        carried.held(held),
        MemorySeen(leaves.values()) as saved,
    ):
        loss, metrics, after = module.forward(*map_tensors(copy, batch))
        left = saved.alive()
        own = {id(leaf) for leaf in leaves.values()}
        others = [leaf for leaf in leaves_of(loss) if id(leaf) not in own] if isinstance(loss, Tensor) else []
        found = gradients(loss, list(leaves.values())).found
    if precision is not None:
        precision.refuse_uncalled()
    unused = tuple(n for n, g in zip(leaves, found, strict=True) if g is None)
    if len(unused) == len(leaves):
        raise ValueError(_INDEPENDENT)
    updated = {id(t) for t in seen.tensors}
    assigned = tuple(n for n, b in buffers.items() if after[n] is not b)
    changed = _wholes(
        {**{n: parameters[n] for n in leaves}, **every_buffer},
        [n for n, b in buffers.items() if b._version != versions[n] or id(b) in updated or writes.holds(b)],
        assigned,
    )
    rebound = tuple(n for n, leaf in leaves.items() if leaf.untyped_storage()._cdata != memory[n])
    written = tuple(n for n, leaf in leaves.items() if n in rebound or writes.holds(leaf))
    shapes = {k: (tuple(v.shape), v.dtype) for k, v in metrics.items()}
    reshaped = tuple(n for n in assigned if (after[n].shape, after[n].dtype) != (buffers[n].shape, buffers[n].dtype))
    return LossFacts(shapes, unused, changed, written, rebound, assigned, reshaped, left), others


def _wholes(originals: Tensors, written: Sequence[str], assigned: Sequence[str]) -> tuple[str, ...]:
    """The buffers that a step changes: what holds the others where they share memory.

    Raises ValueError where none does, or where one is the memory of a trained parameter.
    """
    wholes = whole_of(originals)
    changed = dict.fromkeys([*written, *assigned])
    for name in changed:
        whole = wholes.get(name, name)
        if whole is None or whole not in changed or (whole != name and name in assigned):
            raise ValueError(
                f"the forward changes {name} {list(originals[name].shape)}, which shares memory with another tensor of "
                f"the model in a way that a step cannot keep. Keep one of them, and take its part in the forward."
            )
    return tuple(name for name in changed if wholes.get(name, name) == name)


def run_on_fakes(mode: Any, module: LossModule, batch: tuple[Any, ...], carried: Carried) -> None:
    """Forward and backward of `module` on tensors without data, inside of the fake mode `mode`. What is `carried` has
    no data either, and other real memory that is written all the same holds afterwards what it held."""
    real = RealWritesPutBack()
    try:
        _run_on_fakes(mode, module, batch, carried, real)
    finally:
        real.put_back()


def _run_on_fakes(
    mode: Any, module: LossModule, batch: tuple[Any, ...], carried: Carried, real: RealWritesPutBack
) -> None:
    with (
        _compat.shapes_as_the_kernels_have_them(),
        _compat.distributions_check_nothing(),
        mode,
        torch.enable_grad(),
    ):

        def fake(t: Tensor) -> Tensor:
            faked: Tensor = mode.from_tensor(t.detach(), static_shapes=True)
            return faked

        trained = {n: p for n, p in module.model.named_parameters() if p.requires_grad}
        leaves = {n: tagged(fake(p).requires_grad_(), p) for n, p in trained.items()}
        own = dict(module.model.named_buffers())
        buffers = sharing(own, {n: fake(b) for n, b in own.items()}, parts_in(own))
        held = {path: fake(t) for path, t in carried.tensors().items()}
        originals = {**dict(module.model.named_parameters()), **own}
        with (
            real,
            module.holding(leaves, buffers),
            parameters_are_leaves({**leaves, **buffers}, originals),
            carried.held(held),
            no_checkpoint_is_reentrant(),
            SettledCoins(),
        ):
            loss, _, _ = module.forward(*map_tensors(fake, batch))
            torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)


_INDEPENDENT = (
    "the loss does not depend on any trainable parameter of the model; call the model that loss_fn receives as its "
    "first argument (not another one), and keep torch.no_grad() and .detach() out of the way."
)


def unread_sentence(unused: Sequence[str]) -> str:
    """What to say of parameters that a loss never reads."""
    return (
        f"the loss never reads {', '.join(unused)}: their gradient counts as zero, so weight decay still acts. Freeze "
        f"them (requires_grad=False) before compile_training_step() to leave them alone."
    )


def check_loss(loss: Any, metrics: Any) -> None:
    """Raise TypeError or ValueError unless `loss` is a differentiable scalar and `metrics` are tensors."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}; return a 0-dim tensor, or (loss, {{name: tensor}})."
        )
    if loss.ndim:
        raise ValueError(
            f"loss_fn returned a loss of shape {list(loss.shape)}; return a scalar, for example loss.mean()."
        )
    if not loss.is_floating_point():
        raise TypeError(f"loss_fn returned a loss of dtype {loss.dtype}; return a floating-point scalar.")
    if not isinstance(metrics, dict) or not all(isinstance(v, Tensor) for v in metrics.values()):
        raise TypeError("loss_fn's second result must be a dictionary of tensors, {name: tensor}.")
    if not loss.requires_grad:
        raise ValueError(_INDEPENDENT)
