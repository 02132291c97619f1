"""One denoiser at one shape: its table, its rows and its compiled body."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fusion_compile._program.lower import resolve_mode
from fusion_compile._sampler.conditioning import Batched
from fusion_compile._sampler.graph.call import Call
from fusion_compile._sampler.graph.opened import take_out
from fusion_compile._sampler.loop_body import loop_body
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.rank.range_rows import RangeRows
from fusion_compile._sampler.report import ProgramReport, RowKind
from fusion_compile._sampler.rows import Learnable, Located, Rows
from fusion_compile._sampler.schedule import cast_schedule
from fusion_compile._sampler.specialised import Specialised
from fusion_compile._sampler.split import SplitDenoiser
from fusion_compile._sampler.static_report import static_report
from fusion_compile._sampler.table.conditioning_table import ConditioningTable, bind_weights
from fusion_compile._sampler.table.learned_rows import LearnedRows
from fusion_compile._sampler.table.request_slot import RequestSlot
from fusion_compile._sampler.weights.release import ReleasableWeights
from fusion_compile._sampler.weights.weight_watch import WeightWatch
from fusion_compile.passes import BindingTime
from fusion_compile.passes._compat import tree_map

REQUEST_SLOTS = 2
"""Requests whose rows are kept: a condition, and the unconditional request that guidance alternates with."""


class SamplerProgram:
    """Serves every call whose `Call.key` is that of the call it was built from.

    It keeps the rows of its schedule and of its requests, follows the weights that they depend on, and refuses what
    needs weights that were dropped. `early_names`, `body_names`, `unread_names`: full names of the weights that the
    stages read, that the body reads, and that the output does not depend on. `like`: the timestep it was built with.
    `split`: the graphs that it was made from. `specialised`: what its trace read from tensors.
    """

    def __init__(
        self, model_name: str, split: SplitDenoiser, options: SamplerOptions, weights: ReleasableWeights
    ) -> None:
        self.split, self._options, self._weights = split, options, weights
        self.specialised = Specialised(split, model_name)
        self._device = split.call.tensors[split.positions("live")[0]].device
        self._steps_at, self._request_at = split.positions("step"), split.positions("request")
        self.like = split.timesteps[0].detach()
        self._example = {
            name: tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, value)
            for name, value in split.call.arguments.items()
        }
        self._follows: Tensor | None = None  # the schedule that has rows
        self._scheduled: list[int] = []  # and its rows
        self._row_indices: list[Tensor] = []
        self.rows: Rows = _rows_of(split, options)
        self._request_names = tuple(split.traced.inputs[i] for i in self._request_at)
        self._name_weights()
        self._lower(model_name)

    def _name_weights(self) -> None:
        split = self.split
        self._reads = {time: split.read_by(stage.inputs) for time, stage in split.hoisted.stages.items()}
        self.body_names = split.read_by(split.hoisted.body.inputs) | self.specialised.weight_names
        self.prologue_names = self._weights_of((BindingTime.REQUEST, BindingTime.STEP_REQUEST))
        self.early_names = self._weights_of(self._reads)
        self.unread_names = frozenset(split.full_names.values()) - self.early_names - self.body_names
        read = {split.full_names[n]: weight for n, weight in split.traced.weights.items() if n in split.full_names}
        other = {n: tensor for n, tensor in split.traced.weights.items() if n not in split.full_names}
        self._others = {time: other.keys() & {*stage.inputs} for time, stage in split.hoisted.stages.items()}
        others = frozenset[str]().union(*self._others.values())
        watched = {name: read[name] for name in self.early_names | self.specialised.weight_names}
        self._watch = WeightWatch(watched, {n: tensor for n, tensor in other.items() if n in others})

    def _lower(self, model_name: str) -> None:
        split, batched = self.split, isinstance(self._options.conditioning, Batched)
        backend = self._options.backend
        mode = resolve_mode(self._options.mode, self._device, backend)
        self.table = ConditioningTable(split, batched=batched, n_slots=REQUEST_SLOTS, mode=mode, backend=backend)
        self._body_graph: fx.GraphModule = split.hoisted.body.graph_module
        left = bind_weights(self._body_graph, {**split.traced.weights, **self.table.residuals()})
        self._live = tuple(map(split.traced.inputs.index, left))
        live = [split.call.tensors[i] for i in self._live]
        self._body = loop_body(self._body_graph, live, mode=mode, backend=backend)
        kind: RowKind = "approximate" if split.rank is not None else "batched" if batched else "exact"
        self._static_report = static_report(split, model=model_name, mode=mode, rows=kind)

    @property
    def not_captured(self) -> str | None:
        """Why the body is not the CUDA graph that its mode asks for; None if it is one or none was asked for."""
        return self._body.not_captured

    def copies_of(self, weights: Collection[str]) -> int:
        """Bytes that the table holds in place of `weights` (full names), for the requests that are in it now."""
        return self.split.copies_of(weights, len(self.table.live_slots()))

    def report(self, released: int) -> ProgramReport:
        """What was hoisted and declined."""
        rank, static = self.split.rank, self._static_report
        return replace(
            static,
            rank=None if rank is None else rank.report(),
            declined=static.declined if rank is None else (*rank.declined, *static.declined),
            measured_difference=self.table.measured_difference,
            released=released,
            regions=self._body.repeated,
            replay=self.not_captured or ("the loop's body is one CUDA graph" if self._body.captured else ""),
        )

    # ---- timesteps

    def locate(self, call: Call, slot: RequestSlot | None) -> Located:
        """The row that serves the timestep of `call`, which is for `slot`."""
        t, *more = (call.tensors[i] for i in self._steps_at)
        return self.rows.locate(t, slot, *more)

    def starts_trajectory(self, row: int, slot: RequestSlot, *, new: bool) -> bool:
        """Count a call whose row the CPU knows; return whether a trajectory starts with it."""
        return self.rows.starts_trajectory(row, slot, new=new)

    def learn_timestep(self, call: Call, slot: RequestSlot | None, unknown: Learnable) -> int:
        """Give the timestep of `call` a row, which is computed later.

        Raises RuntimeError if computing it needs weights that were dropped.
        """
        self._refuse_new_rows(self.table.stages_missing(slot, (-1,)), unknown.values)
        row = unknown.learn()
        t, *more = (call.tensors[i] for i in self._steps_at)
        self.table.assign_row(row, t, self.rows.capacity, *more)
        return row

    def follow_schedule(self, schedule: Tensor | None) -> None:
        """Give the timesteps of `schedule` ``[n]`` rows, once; None is no schedule.

        Raises ValueError if the dtype of the timestep cannot hold them, RuntimeError as `learn_timestep` does.
        """
        if schedule is None:
            self._follows, self._scheduled = None, []
        elif self._follows is not schedule:
            self._scheduled = self.assign_rows(schedule)
            self._follows = schedule

    def assign_rows(self, schedule: Tensor) -> list[int]:
        """Give the values of `schedule` ``[n]`` on the CPU rows; equal values have one. Raises as `follow_schedule`."""
        values = cast_schedule(schedule, self.like)
        if unknown := self.rows.without_row(values):
            self._refuse_new_rows((BindingTime.STEP, BindingTime.STEP_REQUEST), unknown[:4])
        assigned = self.rows.assign(values)
        self.table.assign_rows(assigned, self.rows.capacity)
        return assigned.rows

    def rows_in_use(self) -> range:
        """All rows in use."""
        return range(len(self.rows))

    def rows_ahead(self) -> Sequence[int]:
        """The rows to compute together with a requested row: none while exact rows are learned one by one."""
        if self._follows is not None:
            return self._scheduled
        return self.rows_in_use() if isinstance(self._options.conditioning, Batched) or self._weights.names else ()

    def scheduled_rows(self) -> Sequence[int]:
        """The rows of the schedule; without one, all rows in use."""
        return self._scheduled or self.rows_in_use()

    def complete(self, preset: Tensor) -> None:
        """Compute all that can be served once weights are gone, for every request that is kept.

        Without a schedule this includes `preset` ``[n]``, if no other timestep was asked for. Raises ValueError if no
        timestep is known.
        """
        if self._follows is None and self.like.is_floating_point() and self.rows.has_only(preset.to(self.like.dtype)):
            self.assign_rows(preset)
        if not self.rows_in_use():
            raise ValueError(
                "no timestep is known yet, so nothing could be served without the weights: call "
                "prepare(timesteps=...), or sample one image, before release_weights(to='drop')."
            )
        self._compute_for_all_requests(self.rows_in_use())

    # ---- requests

    def find_request(self, call: Call) -> RequestSlot | None:
        """The slot of the request of `call`, or None if it is new."""
        return self.table.find_request(self._request_of(call))

    def open_request(self, call: Call) -> RequestSlot:
        """Assign a slot to the new request of `call`; raises RuntimeError if it needs weights that were dropped."""
        self._weights.refuse_if_dropped(self.prologue_names, "a new request", "release with keep_prologue=True")
        return self.table.take_slot(self._request_of(call))

    def changed_arguments(self, call: Call) -> tuple[str, ...]:
        """The arguments in which the request of `call`, whose slot was just taken, differs from the request before."""
        slots = self.table.live_slots()
        if len(slots) < 2:
            return ()
        before, now = slots[-2:]
        owners = [call.owners[i] for i in self._request_at]
        differs = [
            owner
            for name, owner in zip(self._request_names, owners, strict=True)
            if not torch.equal(before.known[name], now.known[name])
        ]
        return tuple(dict.fromkeys(differs))

    def complete_arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the arguments that `given` leaves out from the call that this was built from.

        Latents and timesteps become zeros of their shape, constants stay. Raises TypeError if a tensor of the request
        is left out.
        """
        arguments = {**self._example, **given}
        if lacking := [n for n in self.split.roles.named("request") if n not in given]:
            raise TypeError(
                f"prepare() lacks {lacking} of the request, with which the model was last called; pass all arguments "
                f"of the request in kwargs=."
            )
        return {
            name: value if name in given else tree_map(lambda leaf: _zeros_like(leaf, self._device), value)
            for name, value in arguments.items()
        }

    def _request_of(self, call: Call) -> dict[str, Tensor]:
        return {name: call.tensors[i] for name, i in zip(self._request_names, self._request_at, strict=True)}

    # ---- computing and running

    def prepare_request(self, call: Call, slot: RequestSlot | None, rows: Iterable[int]) -> RequestSlot:
        """Compute what is missing of `rows` for the request of `call`; `slot` is its slot, or None if it is new."""
        slot = slot or self.open_request(call)
        self.compute_rows(slot, rows)
        return slot

    def prepare_schedule(self) -> None:
        """Compute what is missing of the schedule's rows, for every request that is kept."""
        self._compute_for_all_requests(self._scheduled)

    def compute_rows(self, slot: RequestSlot | None, rows: Iterable[int]) -> None:
        """Compute what is missing of `rows` for `slot`; without one, the part that no request decides.

        Raises RuntimeError if this needs weights that were dropped.
        """
        rows = list(rows)
        if needed := self.table.stages_missing(slot, rows):
            self._weights.refuse_if_dropped(self._weights_of(needed), "what was changed", "do not change them")
            with self._weights.resident():
                self.table.compute(slot, rows)

    def row_index(self, row: int) -> Tensor:
        """`row` as ``[1]`` int64 on the device of the latent."""
        while len(self._row_indices) <= row:
            self._row_indices.append(torch.tensor([len(self._row_indices)], device=self._device))
        return self._row_indices[row]

    def set_timestep(self, tensors: list[Tensor], t: Tensor) -> None:
        """Write the value `t` ``[]`` into the timestep among the `tensors` of a call, if the body reads it."""
        if self.split.rank is not None:
            at = self._steps_at[0]
            tensors[at] = torch.full_like(tensors[at], t.item())

    def denoise(
        self,
        slot: RequestSlot,
        row: Tensor,
        tensors: Sequence[Tensor],
        known: Tensor | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Any:
        """The model's output at `row` ``[1]`` of `slot`, or NaN where `known` ``[]`` is given and False.

        `tensors`: the tensors of a call; only live ones are read. `given`: the caller's arguments, out of whose lists
        and dictionaries what the model takes is taken.
        """
        self.table.select(slot, row)
        out = self._body.run(*(tensors[i] for i in self._live))
        if known is not None:
            out = [torch.where(known, o, torch.nan) if o.is_floating_point() else o for o in out]
        if given is not None:
            take_out(given, self.split.traced.taken)
        return self.split.traced.output.made_of(out)

    def _compute_for_all_requests(self, rows: Iterable[int]) -> None:
        for slot in (None, *self.table.live_slots()):
            self.compute_rows(slot, rows)

    # ---- weights

    def follow_weights(self, *, look: bool) -> bool:
        """Invalidate what changed weights feed. `look`: compare contents too, unless ``verify="never"``.

        Return whether weights changed that decide which program serves.
        """
        changed = self._watch.versions_changed()
        verify = self._options.verify
        if verify != "never" and (look or verify == "always" or self._watch.must_compare):
            changed |= self._watch.contents_changed()
        if changed:
            self.invalidate(changed)
            self._watch.accept_current()
        decides = bool(changed & self.specialised.weight_names)
        if decides:
            self.specialised.forget()
        return decides

    def accept_weights(self) -> None:
        """Take the weights as they are now for those that the table was computed from."""
        self._watch.accept_current()

    def invalidate_uncounted(self) -> None:
        """Invalidate what weights that count no versions feed: a state dict was loaded."""
        self.invalidate(self._watch.uncounted())

    def invalidate(self, changed: Iterable[str] | None) -> None:
        """Compute again, when it is needed, what the weights `changed` feed; None invalidates everything."""
        if changed is None:
            self.table.mark_stale()
        else:
            changed = set(changed)
            self.table.mark_stale(t for t, read in self._reads.items() if changed & (read | self._others[t]))
        if self.split.rank is not None and changed != set():
            self.split.rank.measure_again()

    def rebind(self, tensors: Mapping[str, Tensor]) -> bool:
        """Read `tensors` (full name -> tensor) instead of the weights of these names.

        Return False, with nothing done, if the program cannot.
        """
        if self.split.rank is not None:
            return False
        for node, name in self.split.full_names.items():
            for module in (self._body_graph, *self.table.modules()) if name in tensors else ():
                for held in (module._parameters, module._buffers):
                    if node in held:
                        held[node] = tensors[name]  # type: ignore[assignment]
        self._watch.replace(tensors)
        self.specialised.replace(tensors)
        self.invalidate(tensors)
        return True

    def _weights_of(self, stages: Iterable[BindingTime]) -> frozenset[str]:
        return frozenset[str]().union(*(self._reads.get(time, ()) for time in stages))

    def _refuse_new_rows(self, stages: Iterable[BindingTime], values: Sequence[float]) -> None:
        self._weights.refuse_if_dropped(
            self._weights_of(stages),
            f"timestep {values} is not in the sampler's schedule of {len(self.rows)} rows, and its own row",
            "prepare all timesteps before weights are dropped",
        )


def _rows_of(split: SplitDenoiser, options: SamplerOptions) -> Rows:
    t, *more = split.timesteps
    if options.fitted_range is not None:
        return RangeRows(options.fitted_range, t, split.n_steps)
    fixed = options.schedule is not None
    return LearnedRows(t, split.n_steps, fixed=fixed, verify=options.verify, more=tuple(more))


def _zeros_like(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device).zero_()
