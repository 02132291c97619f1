"""The values that depend on timestep and request, computed ahead: one packed row for each timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion_compile._program.lower import without_cuda_graph
from fusion_compile._program.pieces import compile_pieces
from fusion_compile._sampler.rows import Assigned
from fusion_compile._sampler.split import SplitDenoiser
from fusion_compile._sampler.table.request_slot import Part, RequestSlot
from fusion_compile._types import Tensors
from fusion_compile.passes import BindingTime, RowBuffer, Stage, pack_outputs


def bind_weights(graph_module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Turn the inputs named in `tensors` into attributes of `graph_module`; return the names of the other inputs.

    Attributes are read where they lie, and one can be exchanged for another without tracing again.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="placeholder"):
        if node.target not in tensors:
            continue
        name, tensor = str(node.target), tensors[str(node.target)]
        if isinstance(tensor, nn.Parameter):
            graph_module.register_parameter(name, tensor)
        else:
            graph_module.register_buffer(name, tensor, persistent=False)
        with graph.inserting_before(node):
            attribute = graph.get_attr(name)
        attribute.meta.update(node.meta)
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    graph.lint()
    graph_module.recompile()
    return tuple(str(n.target) for n in graph.find_nodes(op="placeholder"))


class _PackedStage:
    """A stage with its weights bound: takes values by name, returns a row for each buffer and the `keep` values."""

    def __init__(
        self,
        stage: Stage,
        buffers: tuple[RowBuffer, ...],
        keep: tuple[str, ...],
        weights: Tensors,
        mode: str,
        backend: str,
    ) -> None:
        self.buffers, self.keep = buffers, keep
        self.module, _ = pack_outputs(stage.graph_module, stage.outputs, buffers, keep)
        self.inputs = bind_weights(self.module, weights)
        self._run: Callable[..., Any] = self.module
        if mode != "eager":
            self._run, _ = compile_pieces(self.module, mode=without_cuda_graph(mode), backend=backend)

    def __call__(self, values: Tensors) -> tuple[Tensors, Tensors]:
        """Return ``({buffer: row [total]}, {kept name: value})``."""
        return self._split(self._run(*(values[name] for name in self.inputs)))

    def batched(self, values: Tensors, stacked: Tensors) -> tuple[Tensors, Tensors]:
        """Compute all rows at once: the values in `stacked` and all results have a leading dimension ``[n_rows]``."""
        dims = tuple(0 if name in stacked else None for name in self.inputs)
        everything = {**values, **stacked}
        return self._split(torch.vmap(self.module, in_dims=dims)(*(everything[name] for name in self.inputs)))

    def _split(self, out: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        names = [b.name for b in self.buffers]
        return dict(zip(names, out[: len(names)], strict=True)), dict(zip(self.keep, out[len(names) :], strict=True))


class ConditioningTable:
    """The tables of one program, and at a fixed address the row of each buffer that the body reads.

    `assign_row` says which timestep a row is for, and `compute` computes rows that are needed and not there.
    `measured_difference`: when `batched`, the largest absolute difference between rows that were first computed in one
    batch and the same rows computed one at a time; otherwise None.
    """

    def __init__(self, split: SplitDenoiser, *, batched: bool, n_slots: int, mode: str, backend: str) -> None:
        self._buffers, self._step_inputs, self._capacity = split.buffers, split.step_inputs, split.n_steps
        self._rows = {b.name: torch.zeros(b.total, dtype=b.dtype, device=b.device) for b in self._buffers}
        self._batched = batched
        self.measured_difference: float | None = 0.0 if batched else None
        self._schedule = Part()
        self._measured: set[BindingTime] = set()
        self._alone: dict[int, dict[str, Tensor]] = {}  # by row, values of one step alone for the stage measured next
        self._slots = [RequestSlot() for _ in range(n_slots)]  # the most recently used last
        self._selected: RequestSlot | None = None
        self._stages: dict[BindingTime, _PackedStage] = {}
        self._feeds: dict[BindingTime, set[BindingTime]] = {}  # stage -> the stages that read its values
        stages = split.hoisted.stages
        for time, stage in stages.items():
            readers = {other for other, s in stages.items() if other is not time and {*s.inputs} & {*stage.outputs}}
            read_later = {n for other in readers for n in stages[other].inputs}
            keep = tuple(n for n in stage.outputs if n in read_later)
            mine = tuple(b for b in self._buffers if b.time is time)
            # the other stages run once, or once per schedule: compiling them would take longer than running them
            its_mode = mode if time is BindingTime.STEP_REQUEST else "eager"
            self._stages[time] = _PackedStage(stage, mine, keep, split.traced.weights, its_mode, backend)
            self._feeds[time] = readers

    def assign_row(self, row: int, t: Tensor, capacity: int, *more: Tensor) -> None:
        """Make row `row` that of the timestep `t` and `more` clocks, in a table with room for `capacity` rows."""
        self._capacity = max(self._capacity, capacity)
        clocks = (clock.detach().clone() for clock in (t, *more))
        self._schedule.per_row[row] = dict(zip(self._step_inputs, clocks, strict=True))
        for part in (self._schedule, *self._slots):
            part.done.discard(row)

    def assign_rows(self, assigned: Assigned, capacity: int) -> None:
        """`assign_row` for every fresh row of `assigned`."""
        for row, t in assigned.fresh.items():
            self.assign_row(row, t, capacity)

    def mark_stale(self, stages: Iterable[BindingTime] = tuple(BindingTime)) -> None:
        """The results of `stages`, and everything computed from them, must be computed again: weights changed."""
        stale, found = set[BindingTime](), set(stages)
        while found:
            stale |= found
            found = {reader for time in found for reader in self._feeds.get(time, ())} - stale
        for part, once, per_row in self._parts():
            part.once &= once not in stale
            if per_row in stale:
                part.done.clear()

    def stages_missing(self, slot: RequestSlot | None, rows: Iterable[int]) -> frozenset[BindingTime]:
        """The stages that must run before `rows` of `slot` can be selected; None is the schedule's part alone."""
        rows, needed = set(rows), set[BindingTime]()
        parts = [(self._schedule, *_SCHEDULE), *([] if slot is None else [(slot, *_REQUEST)])]
        for part, once, per_row in parts:
            needed |= set() if part.once else {once}
            needed |= {per_row} if rows - part.done else set()
        return frozenset(needed & set(self._stages))

    def compute(self, slot: RequestSlot | None, rows: Iterable[int]) -> None:
        """Run the stages that `stages_missing` names for `rows`; without a slot, those of the schedule's part."""
        rows = sorted(rows)
        self._compute_part(self._schedule, *_SCHEDULE, rows, {})
        if (
            slot is not None
            and self._compute_part(slot, *_REQUEST, rows, self._schedule.known)
            and self._selected is slot
        ):
            self._selected = None

    def residuals(self) -> Tensors:
        """Name -> the memory that the body reads: the row that was selected last."""
        return {name: view for b in self._buffers for name, view in b.views(self._rows[b.name]).items()}

    def modules(self) -> tuple[nn.Module, ...]:
        """The stages, with their weights."""
        return tuple(stage.module for stage in self._stages.values())

    def live_slots(self) -> tuple[RequestSlot, ...]:
        """The slots that are assigned to a request."""
        return tuple(slot for slot in self._slots if slot.is_live)

    def find_request(self, asked: Mapping[str, Tensor]) -> RequestSlot | None:
        """The slot of the request `asked` (inputs by name), or None."""
        values = list(asked.values())
        for matches in (RequestSlot.is_same_object, RequestSlot.is_equal):
            for slot in reversed(self._slots):
                if matches(slot, values):
                    self._slots.remove(slot)
                    self._slots.append(slot)
                    return slot
        return None

    def take_slot(self, asked: Mapping[str, Tensor]) -> RequestSlot:
        """Assign the least recently used slot to `asked`, with nothing computed."""
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.assign(asked)
        return slot

    def select(self, slot: RequestSlot, step: Tensor) -> None:
        """Copy row `step` (``[1]`` int64 on the device) of every table to the memory that the body reads.

        One launch for each buffer, and no wait.
        """
        for buffer in self._buffers:
            row = self._rows[buffer.name]
            if buffer.time.per_step:
                table = (self._schedule if buffer.time is BindingTime.STEP else slot).tables[buffer.name]
                torch.index_select(table, 0, step, out=row.view(1, -1))
            elif buffer.time is BindingTime.REQUEST and self._selected is not slot:
                row.copy_(slot.tables[buffer.name][0])
        self._selected = slot

    def _parts(self) -> list[tuple[Part, BindingTime, BindingTime]]:
        return [(self._schedule, *_SCHEDULE), *((slot, *_REQUEST) for slot in self._slots)]

    def _compute_part(
        self, part: Part, once: BindingTime, per_row: BindingTime, rows: list[int], outside: Tensors
    ) -> bool:
        """Run the stages `once` and `per_row` of `part` where they have not run; return whether the first ran."""
        for time in (once, per_row):
            self._make_room(part, time)
        ran = not part.once
        if ran and once in self._stages:
            computed, kept = self._stages[once]({**outside, **part.known})
            part.known.update(kept)
            for name, row in computed.items():
                part.tables[name][0].copy_(row)
        part.once = True
        if (todo := [row for row in rows if row not in part.done]) and per_row in self._stages:
            self._compute_rows(part, per_row, todo, {**outside, **part.known})
        part.done.update(todo)
        return ran

    def _compute_rows(self, part: Part, time: BindingTime, rows: list[int], known: Tensors) -> None:
        stage, values = self._stages[time], self._schedule.per_row
        in_batch = self._batched and len(rows) > 1
        if not in_batch or time not in self._measured:
            for row in rows:
                computed, kept = stage({**known, **values[row], **self._alone.get(row, {})})
                values[row].update(kept)
                if in_batch:
                    self._alone.setdefault(row, {}).update(kept)
                for name, one in computed.items():
                    part.tables[name][row].copy_(one)
        if in_batch:
            stacked = {n: torch.stack([values[row][n] for row in rows]) for n in stage.inputs if n in values[rows[0]]}
            computed, kept = stage.batched(known, stacked)
            at = torch.tensor(rows, device=next(iter(stacked.values())).device)
            for name, several in computed.items():
                if time not in self._measured:
                    self._measure(several, part.tables[name][at])
                part.tables[name][at] = several
            self._measured.add(time)
            if time is BindingTime.STEP_REQUEST:
                self._alone.clear()
            for i, row in enumerate(rows):
                values[row].update({name: value[i] for name, value in kept.items()})

    def _make_room(self, part: Part, time: BindingTime) -> None:
        for buffer in self._stages[time].buffers if time in self._stages else ():
            n_rows = self._capacity if time.per_step else 1
            old = part.tables.get(buffer.name)
            if old is None or len(old) < n_rows:
                if time is BindingTime.CONST:  # the one row is what the body reads
                    part.tables[buffer.name] = self._rows[buffer.name].view(1, -1)
                    continue
                table = torch.empty(n_rows, buffer.total, dtype=buffer.dtype, device=buffer.device)
                if old is not None:
                    table[: len(old)].copy_(old)
                part.tables[buffer.name] = table

    def _measure(self, batched: Tensor, single: Tensor) -> None:
        if batched.numel():
            wide = torch.promote_types(batched.dtype, torch.float64)  # complex stays complex
            difference = float((batched.to(wide) - single.to(wide)).abs().max())
            self.measured_difference = max(self.measured_difference or 0.0, difference)


_SCHEDULE = (BindingTime.CONST, BindingTime.STEP)
_REQUEST = (BindingTime.REQUEST, BindingTime.STEP_REQUEST)
