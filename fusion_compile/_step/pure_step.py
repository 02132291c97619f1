"""One training step as a pure function over flat state: ``advance(state, batch) -> the tensors that changed``.

Everything a step does happens here and nowhere else: forward, backward, accumulation, clipping, the non-finite skip,
the optimizer's update, buffers and metrics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._capture.by_running.leaves import parameters_are_leaves
from fusion_compile._ranks.division import Division
from fusion_compile._shared_memory import parts_in, sharing
from fusion_compile._state import flat_tree, keys
from fusion_compile._state.banks import Layout
from fusion_compile._state.half_precision import counted, entries, packed, shown_weights, unpacked
from fusion_compile._state.kept_average import parameters_of, views_of
from fusion_compile._state.kept_gradients import kept_gradients
from fusion_compile._state.masters import with_written_weights
from fusion_compile._step.across_ranks import Before, Local, norm_of_all, reduced, weight_of
from fusion_compile._step.apart import norm_of, stays_apart
from fusion_compile._step.carried import Carried
from fusion_compile._step.gradient_hooks import hooked_leaf
from fusion_compile._step.gradients import gradients
from fusion_compile._step.loss import LossFacts, LossModule
from fusion_compile._step.loss_scale import LossScale, moved, scale_of, scaled, start, unscaled
from fusion_compile._step.micro_batches import Shares, micro_batches, times
from fusion_compile._step.options import StepOptions
from fusion_compile._step.precision import Precision
from fusion_compile._step.unread import left_alone, moving, present, refuse_other_unread
from fusion_compile._step.update import UpdatePlan, is_alike, pure_update, settled
from fusion_compile._step.written import Written, with_written_point
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import State
from fusion_compile.optim.clip_by_global_norm import clip_factor, global_norm

CLIP = "clip_grad_norm"
"""The hyperparameter that the step itself adds: the bound on the gradient's global norm (infinite: none)."""
COUNTS = ("step", "skipped")
METRICS = ("loss", "grad_norm", "update_norm")


@dataclass(frozen=True)
class StepPlan:
    """Everything that is fixed when a step is compiled: the optimizer's update, the options, in what the loss
    computes, and how the state is divided among ranks, if there are several."""

    update: UpdatePlan
    options: StepOptions
    precision: Precision
    division: Division | None = None

    @property
    def whole(self) -> Layout:
        """The model's banks. The update's are this rank's part of them."""
        return self.update.layout if self.division is None else self.division.whole

    @property
    def loss_scale(self) -> LossScale | None:
        """How the loss is scaled; None where it is not."""
        dtypes = [bank.dtype for bank in self.update.layout.banks]
        return scale_of(self.options.loss_scale, [self.options.compute_dtype, *dtypes])


def initial_state(
    plan: UpdatePlan,
    module_banks: Tensors,
    optimizer: State,
    half_precision: str = "master",
    loss_scale: LossScale | None = None,
) -> Tensors:
    """The flat state before the first step, under the keys of ``_state.keys``.

    A bank of the module is itself the optimizer's ``params`` entry where it has the state dtype. Where it is of lower
    precision, `half_precision` says what is kept beside it. Buffers and the user's metrics join when the loss is first
    seen.
    """
    dtype, device = plan.layout.state_dtype, plan.layout.device
    state = entries(half_precision, plan.layout, module_banks)
    state.update(flat_tree.flatten(optimizer, keys.OPTIMIZER))
    state[keys.HYPERPARAMETERS] = plan.hyperparameters.tensor
    state |= {keys.counts(name): torch.zeros((), dtype=torch.int64, device=device) for name in COUNTS}
    state |= {keys.metrics(name): torch.zeros((), dtype=dtype, device=device) for name in METRICS}
    if loss_scale is not None:
        state |= start(loss_scale, device)
    if plan.transform.periodic:
        state[keys.TAKEN] = torch.ones((), dtype=torch.bool, device=device)
    for tensor in state.values():
        _compat.mark_static(tensor)
    return state


def weights_at(plan: StepPlan, point: Tensors, kept: Tensors) -> Tensors:
    """The weights that the loss sees, by full name, from banks at the gradient point. `kept`: the state as it is kept,
    whose module's banks are these weights where the gradient is taken at them."""
    own = shown_weights(plan.update.layout, kept) if plan.update.transform.gradient_point is None else {}
    seen = {**point, **own}
    divided = {} if plan.division is None else plan.division.seen(seen, kept)
    found: Tensors = {}
    for b in plan.whole.banks:
        named = {p.name: divided[p.name] for p in b.places if p.name in divided}
        found |= named or zip((p.name for p in b.places), b.split(seen[b.key]), strict=True)
    dtypes = {p.name: b.dtype for b in plan.whole.banks for p in b.places}
    return {name: v if v.dtype == dtypes[name] else v.to(dtypes[name]) for name, v in found.items()}


@dataclass(frozen=True)
class Form:
    """How a step is written down.

    Attributes:
        due: Whether it is one of the steps that the transform's `period` singles out.
        one_backward: With `accumulate`, run all forwards before one backward instead of a backward after each forward.
            Where Dynamo reads the step, torch recomputes checkpointed activations in one backward region only, so a
            step that checkpoints and accumulates needs this form.
        runs: Whether Python runs when the step is captured (or is not captured at all), and is not read by Dynamo. The
            model's weights are then leaves that pass for its parameters, and the state that user code keeps is carried.
        before: With ranks, where nothing is captured: called when this rank has its gradient, before it communicates.
    """

    due: bool = False
    one_backward: bool = False
    runs: bool = False
    before: Before | None = None


def pure_step(
    plan: StepPlan, loss: LossModule, facts: LossFacts, carried: Carried, form: Form
) -> Callable[[Tensors, tuple[Any, ...]], Tensors]:
    """The step as a function that changes none of its arguments and returns the new values by key."""
    layout, options, scale = plan.update.layout, plan.options, plan.loss_scale
    division, whole_layout = plan.division, plan.whole
    joined = layout.join if division is None else division.pieces
    parameters = dict(loss.model.named_parameters())
    own_buffers = dict(loss.model.named_buffers())
    parts_of_buffers = parts_in(own_buffers)
    originals = {**parameters, **own_buffers, **parameters_of(options.averages)}
    # Regions write gradients into their banks, and a norm of each parameter's would grow with depth; ranks send pieces.
    apart = options.granularity == "program" and division is None
    apart = apart and stays_apart(layout, facts.saved, accumulate=options.accumulate)
    leaves_unread, rules = plan.update.transform.extras.leaves_unread, options.rules
    hooked = form.runs and any(map(_compat.gradient_hooks, parameters.values()))

    def forward(leaves: Tensors, batch: tuple[Any, ...]) -> tuple[Tensor, Tensors, Tensors]:
        """Loss, metrics and the buffers afterwards."""
        with torch.enable_grad(), _compat.region("forward"):
            value, metrics, after = loss.forward(*batch)
        return value, {k: m.detach() for k, m in metrics.items()}, {k: b.detach() for k, b in after.items()}

    def backward(
        values: list[Tensor], forwards: list[Tensors], divisor: Tensor | int, scales: Tensors, read: set[str]
    ) -> Tensors:
        """Gradients of the sum of `values` by `divisor`, summed over the leaves of `forwards`, in the state dtype: by
        name, or banks where the norm is taken of those.

        `scales`: the state, whose scale the loss has during its backward. `read` gets the parameters with a gradient.
        """
        left_out = () if form.runs else facts.unused
        used = tuple((i, n) for i, leaves in enumerate(forwards) for n in leaves if n not in left_out)
        with torch.enable_grad(), _compat.region("backward"):
            whole = isinstance(divisor, int) and divisor == 1
            summed = scaled(_sum(values) if whole else _sum(values) / divisor, scales)
            given = [forwards[i][n] for i, n in used]
            found: Sequence[Tensor | None]
            if form.runs:
                found = gradients(
                    summed, given, divided=options.accumulate > 1 or scale is not None, also=carried.trained
                ).found
            else:
                found = torch.autograd.grad(summed, given)
        by_place = {at: g for at, g in zip(used, found, strict=True) if g is not None}
        read.update(name for _, name in by_place)
        if form.runs and not leaves_unread:
            refuse_other_unread([at[1] for at in used if at not in by_place], facts.unused)
        total: Tensors = {}
        for i, leaves in enumerate(forwards):
            named = {n: by_place[i, n] if (i, n) in by_place else torch.zeros_like(w) for n, w in leaves.items()}
            own = {n: g.to(layout.state_dtype) for n, g in named.items()} if apart else joined(named)
            total = own if i == 0 else {k: g + own[k] for k, g in total.items()}
        return unscaled(total, scales)

    def advance(state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        skips = options.skip_nonfinite or scale is not None
        wide = {} if division is None else division.whole_entries(state)
        as_kept = with_written_weights(layout, state if division is None else division.narrowed(state))
        state = unpacked(layout, as_kept)
        context = plan.update.context(state, due=form.due)._replace(finite=skips)
        point = plan.update.gradient_point(state, context)

        read: set[str] = set()
        before = {n: state[keys.buffers(n)] for n in facts.changed_buffers}
        buffers = before
        kept = keys.section(state, keys.CARRIED)
        values: list[Tensor] = []
        counts: list[Tensor | int] = []
        found: list[Tensors] = []
        forwards: list[Tensors] = []
        grads: Tensors = {}
        averages = views_of(options.averages, whole_layout, {**as_kept, **wide})  # as they are before this step
        weights, before_writes = weights_at(plan, point, {**as_kept, **wide}), state
        seen = weights
        parts = micro_batches(batch, options.accumulate)
        shares = Shares.of(parts, options.weigh_by)
        # Hooks and custom backwards see what they see in the ordinary loop, which divides a loss before its backward.
        known = shares.known_total()
        if known is None and hooked:
            raise ValueError(_unknown_total(shares))
        for i, micro in enumerate(parts):
            # A clone: the loss may write into its buffers, and a skipped step needs the old values.
            own = sharing(own_buffers, {n: b.clone() for n, b in buffers.items()}, parts_of_buffers)
            leaves = {n: leaf(n, w.clone() if n in facts.written else w) for n, w in weights.items()}
            there = {**leaves, **own, **averages}
            with loss.holding(leaves, own), held(there, kept, goes_on=i > 0) if form.runs else nothing_held():
                value, metrics, buffers = forward(leaves, micro.batch)
                counts.append(shares.weight(i, metrics))
                with torch.enable_grad():
                    value = times(value, counts[i])
                if form.one_backward:
                    forwards.append(leaves)
                else:
                    own_grads = backward([value], [leaves], known or 1, state, read)
                    grads = {k: grads[k] + g if i else g for k, g in own_grads.items()}
                if form.runs:  # after the backward, whose recomputation counts in statistics too
                    kept = carried.now()
            weights = {**weights, **{n: leaves[n].detach() for n in facts.written}}
            values.append(value)
            found.append(metrics)
        total = shares.total(counts)
        if form.one_backward:
            grads = backward(values, forwards, known or 1, state, read)
        if facts.written:
            written = {n: Written(seen[n], weights[n]) for n in facts.written}
            first = state[keys.counts("step")] == 0
            state = with_written_point(plan.update, state, point, written, context, first)
        # The mean of losses in half precision is taken in the state's.
        value = _sum([v.detach().to(torch.promote_types(v.dtype, torch.float32)) for v in values])
        if len(parts) > 1:
            value = value / total
            grads = grads if known is not None else {k: g / total for k, g in grads.items()}
        metrics = shares.mean(found, counts, layout.state_dtype)
        norm_of_ranks, whole_grads = None, grads
        if division is not None:
            weight = weight_of(batch, metrics, options.weigh_by, value)
            local = Local(grads, value, metrics, buffers, weight)
            if form.before is not None:
                form.before(local)
            of_all = reduced(division, local, options.weigh_by, whole=options.keep_gradients)
            grads, norm_of_ranks, value, metrics, buffers, whole_grads = of_all

        with _compat.region("optimizer"):
            norm = norm_of(grads) if apart else norm_of_ranks if norm_of_ranks is not None else global_norm(grads)
            if joins_at_once := apart and options.keep_gradients:
                grads = layout.join(grads)
            factor = clip_factor(norm, context.hyperparameters[CLIP])
            clipped = {k: g * factor.to(g.dtype) for k, g in grads.items()}
            clipped = layout.join(clipped) if apart and not joins_at_once else clipped
            unread = [n for n in weights if n not in read] if leaves_unread else []
            context = context._replace(loss=value, present=present(layout, unread if rules else []))
            new, updates = pure_update(plan.update, state, clipped, context)
            if unread:
                new, updates = left_alone(layout, new, state, unread, rules), moving(layout, updates, unread)
        new |= {keys.buffers(n): buffers[n].to(b.dtype) for n, b in before.items()}
        new |= {keys.carried(path): t.detach() for path, t in kept.items()}
        new[keys.counts("step")] = state[keys.counts("step")] + 1
        new |= counted(state)
        taken = takes(new, before_writes, norm) if skips else None
        new[keys.metrics("update_norm")], taken = norm_of_all(division, updates, taken)
        new = settled(new, before_writes) if taken is None else skip_nonfinite(new, before_writes, taken)
        new |= {} if scale is None else moved(scale, state, norm)
        if twice := sorted({*METRICS} & metrics.keys()):
            raise ValueError(f"the metric name {twice[0]!r} is taken by the step itself; give the loss's another one.")
        shown = {"loss": value.to(layout.state_dtype), "grad_norm": norm, **metrics}
        seen_later = {keys.metrics(k): m for k, m in shown.items()}
        kept_whole = grads if division is None else whole_grads
        seen_later |= kept_gradients(whole_layout, kept_whole, as_kept) if options.keep_gradients else {}
        new |= settled(seen_later, before_writes)
        after = packed(layout, new, before_writes, as_kept, plan.update.noise)
        if division is None or not wide:
            return after
        with _compat.region("communication"):
            return division.widened(after, wide)

    def leaf(name: str, value: Tensor) -> Tensor:
        return hooked_leaf(parameters[name], value) if form.runs else value.detach().requires_grad_()

    @contextlib.contextmanager
    def held(there: Tensors, kept: Tensors, *, goes_on: bool) -> Iterator[None]:
        """What the loss finds besides the model: what stands for the model's own and for averages of its weights where
        it keeps them itself, and the state that it keeps."""
        own = [(tensor, originals[name]) for name, tensor in there.items()]
        clones = {k: t.clone() for k, t in kept.items()}
        with parameters_are_leaves(there, originals), carried.held(clones, own, goes_on=goes_on):
            yield

    def nothing_held() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    return advance


def takes(new: Tensors, state: Tensors, norm: Tensor) -> Tensor:
    """Whether a step may be taken, 0-dim bool.

    It may not if the gradient's norm is not finite, or if a number that the optimizer keeps (a step size from the
    loss) becomes infinite or nan.
    """
    taken = torch.isfinite(norm)
    for key, tensor in new.items():
        if keys.split(key)[0] == keys.OPTIMIZER and not tensor.ndim and tensor.is_floating_point():
            taken = taken & (tensor.isfinite() | ~state[key].isfinite())
    return taken


def skip_nonfinite(new: Tensors, state: Tensors, taken: Tensor) -> Tensors:
    """`new`, or what `state` held where the step is not `taken`, and the count of such steps.

    In a step that is taken, an entry of a weight or of the optimizer's tensors that would become infinite or nan (0/0
    in an update whose gradient is finite) stays as it was. Both count.

    A select on every write: it fuses into the kernels that write anyway. Scaling by zero would not do: 0 · nan is nan.
    For the same reason an entry decides for itself: asking all entries before the first is written would compute the
    update twice. State that is there for the first time, or has another shape, has nothing to fall back on and stays
    new.
    """

    def kept(key: str, tensor: Tensor) -> Tensor:
        if key not in state or not is_alike(tensor, state[key]):
            return tensor
        return torch.where(taken & finite_entries(tensor) if _decides(key, tensor) else taken, tensor, state[key])

    skipped = ~(taken & torch.isfinite(new[keys.metrics("update_norm")]))
    after = {key: kept(key, tensor) for key, tensor in new.items()}
    after[keys.counts("skipped")] = state[keys.counts("skipped")] + skipped
    return after | ({keys.TAKEN: taken} if keys.TAKEN in state else {})


def _decides(key: str, tensor: Tensor) -> bool:
    """Whether the entries of `tensor` are looked at one by one. Buffers may hold what the user likes."""
    return keys.split(key)[0] in (keys.PARAMS, keys.OPTIMIZER) and tensor.ndim > 0 and tensor.is_floating_point()


def finite_entries(tensor: Tensor) -> Tensor:
    """Which entries are finite. A comparison, which Inductor vectorizes on a CPU; `isfinite` it does not."""
    return tensor.abs() <= torch.finfo(tensor.dtype).max


def _unknown_total(shares: Shares) -> str:
    """What to say where hooks on parameters meet a divisor that is what the loss will count."""
    return (
        f"weigh_by={shares.weigh_by!r} with gradient hooks: a hook would see a gradient before the count of all "
        f"micro-batches is known, by which it is divided. Leave out the hook or weigh_by."
    )


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
