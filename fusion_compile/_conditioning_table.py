"""What a schedule and a request decide, computed ahead: one packed row for each step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion_compile._types import Tensors
from fusion_compile.passes import BindingTime, Hoisted, RowBuffer, Stage, pack_outputs

Lower = Callable[[Callable[..., Any]], Callable[..., Any]]


def bind_weights(graph_module: fx.GraphModule, tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Make the inputs named in `tensors` attributes of `graph_module`; return the inputs that are left.

    As attributes of a module they are static to torch.compile: a CUDA graph reads them where they are.
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


def _as_it_is(run: Callable[..., Any]) -> Callable[..., Any]:
    return run


class _PackedStage:
    """A stage with its weights bound: values by name in, one row each buffer and the values in `keep` out."""

    def __init__(
        self, stage: Stage, buffers: tuple[RowBuffer, ...], keep: tuple[str, ...], weights: Tensors, lower: Lower
    ) -> None:
        self.buffers, self.keep = buffers, keep
        self._module, _ = pack_outputs(stage.graph_module, stage.outputs, buffers, keep)
        self.inputs = bind_weights(self._module, weights)
        self._run = lower(self._module)

    def __call__(self, values: Tensors) -> tuple[Tensors, Tensors]:
        """``({buffer: row [total]}, {kept name: value})``."""
        return self._split(self._run(*(values[name] for name in self.inputs)))

    def batched(self, values: Tensors, stacked: Tensors) -> tuple[Tensors, Tensors]:
        """All steps at once, without a loop: values in `stacked` and all that is returned lead with ``[n_steps]``."""
        dims = tuple(0 if name in stacked else None for name in self.inputs)
        everything = {**values, **stacked}
        return self._split(torch.vmap(self._module, in_dims=dims)(*(everything[name] for name in self.inputs)))

    def _split(self, out: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        names = [b.name for b in self.buffers]
        return dict(zip(names, out[: len(names)], strict=True)), dict(zip(self.keep, out[len(names) :], strict=True))


class RequestSlot:
    """One request: what was asked for, and its tables by buffer name, ``[n_rows, total]``."""

    def __init__(self) -> None:
        self.tables: dict[str, Tensor] = {}
        self._asked: tuple[Tensor, ...] | None = None
        self._identities: tuple[tuple[weakref.ref[Tensor], int], ...] = ()

    def remember(self, asked: Sequence[Tensor]) -> None:
        """`asked` is what the tables now belong to."""
        self._asked = tuple(t.detach().clone() for t in asked)
        self._identify(asked)

    def forget(self) -> None:
        """The tables belong to nothing."""
        self._asked = None
        self._identities = ()

    def is_same_object(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` are the very tensors remembered, unchanged since; costs no look at the device."""
        return (
            self._asked is not None
            and len(self._identities) == len(asked)
            and all(
                ref() is t and version == _version(t) for (ref, version), t in zip(self._identities, asked, strict=True)
            )
        )

    def is_equal(self, asked: Sequence[Tensor]) -> bool:
        """Whether `asked` holds the same numbers; on a GPU this waits for the device."""
        if self._asked is None or not all(map(torch.equal, self._asked, asked)):
            return False
        self._identify(asked)
        return True

    def _identify(self, asked: Sequence[Tensor]) -> None:
        tracked = all(_version(t) is not None for t in asked)
        self._identities = tuple((weakref.ref(t), _version(t) or 0) for t in asked) if tracked else ()


def _version(t: Tensor) -> int | None:
    """None for an inference tensor, which counts no versions; its contents are compared at every call."""
    return None if t.is_inference() else t._version


class ConditioningTable:
    """The tables of one program, and `rows`: for each buffer the ``[total]`` tensor the body reads, at a fixed address.

    `timesteps`: the step input's value at each step. `measured_difference`: when batched, the largest absolute
    difference between batched rows and rows computed one step at a time, over the first schedule and request;
    otherwise None.
    """

    def __init__(
        self,
        hoisted: Hoisted,
        buffers: tuple[RowBuffer, ...],
        weights: Tensors,
        step_input: str,
        timesteps: Sequence[Tensor],
        *,
        batched: bool,
        n_slots: int,
        lower: Lower,
    ) -> None:
        self.rows = {b.name: torch.zeros(b.total, dtype=b.dtype, device=b.device) for b in buffers}
        self.measured_difference: float | None = 0.0 if batched else None
        self._buffers, self._step_input, self._timesteps, self._batched = buffers, step_input, timesteps, batched
        self._tables: Tensors = {}
        self._known: Tensors = {}
        self._known_per_step: list[Tensors] = []
        self._filled = False
        self._measured: set[BindingTime] = set()
        self._slots = [RequestSlot() for _ in range(n_slots)]  # the most recently used last
        self._selected: RequestSlot | None = None
        self._stages: dict[BindingTime, _PackedStage] = {}
        for time, stage in hoisted.stages.items():
            read_later = {n for other, s in hoisted.stages.items() if other is not time for n in s.inputs}
            keep = tuple(n for n in stage.outputs if n in read_later)
            mine = tuple(b for b in buffers if b.time is time)
            # the other stages run once, or once per schedule: compiling them would take longer than they ever do
            compiled = lower if time is BindingTime.STEP_REQUEST else _as_it_is
            self._stages[time] = _PackedStage(stage, mine, keep, weights, compiled)

    def forget(self) -> None:
        """Drop what was computed, because weights changed; memory of the tables is kept for the next."""
        self._filled = False
        self._selected = None
        for slot in self._slots:
            slot.forget()

    @property
    def is_filled(self) -> bool:
        """Whether the schedule's part is there."""
        return self._filled

    def fill_schedule(self) -> None:
        """Compute what weights and timesteps decide."""
        self._known = {}
        self._known_per_step = [{self._step_input: t} for t in self._timesteps]
        self._fill(BindingTime.CONST, self._known, [], self._tables)
        self._fill(BindingTime.STEP, self._known, self._known_per_step, self._tables)
        for buffer in self._buffers:
            if buffer.time is BindingTime.CONST:
                self.rows[buffer.name].copy_(self._tables[buffer.name][0])
        self._filled = True

    def find_request(self, asked: Mapping[str, Tensor]) -> RequestSlot | None:
        """The slot that holds `asked` (request inputs by name), or None."""
        values = list(asked.values())
        for matches in (RequestSlot.is_same_object, RequestSlot.is_equal):
            for slot in reversed(self._slots):
                if matches(slot, values):
                    self._slots.remove(slot)
                    self._slots.append(slot)
                    return slot
        return None

    def fill_request(self, asked: Mapping[str, Tensor]) -> RequestSlot:
        """Compute what `asked` decides, for all steps, in the slot that was not used for longest."""
        slot = self._slots.pop(0)
        self._slots.append(slot)
        slot.forget()
        if self._selected is slot:
            self._selected = None
        known = {**self._known, **asked}
        per_step = [dict(values) for values in self._known_per_step]
        self._fill(BindingTime.REQUEST, known, [], slot.tables)
        self._fill(BindingTime.STEP_REQUEST, known, per_step, slot.tables)
        slot.remember(list(asked.values()))
        return slot

    def select(self, slot: RequestSlot, step: Tensor) -> None:
        """Copy row `step` (``[1]`` int64 on the device) of every table into `rows`: one launch a buffer, no wait."""
        for buffer in self._buffers:
            row = self.rows[buffer.name]
            if buffer.time.per_step:
                table = (self._tables if buffer.time is BindingTime.STEP else slot.tables)[buffer.name]
                torch.index_select(table, 0, step, out=row.view(1, -1))
            elif buffer.time is BindingTime.REQUEST and self._selected is not slot:
                row.copy_(slot.tables[buffer.name][0])
        self._selected = slot

    def _fill(self, time: BindingTime, known: Tensors, per_step: list[Tensors], tables: Tensors) -> None:
        """Run the stage of `time`: rows go to `tables`, other values to `known` or, a step each, to `per_step`."""
        stage = self._stages.get(time)
        if stage is None:
            return
        n_rows = len(self._timesteps) if time.per_step else 1
        for buffer in stage.buffers:
            if buffer.name not in tables:
                tables[buffer.name] = torch.empty(n_rows, buffer.total, dtype=buffer.dtype, device=buffer.device)
        if not time.per_step:
            rows, kept = stage(known)
            known.update(kept)
            for name, row in rows.items():
                tables[name][0].copy_(row)
            return
        if not self._batched or time not in self._measured:
            for i, values in enumerate(per_step):
                rows, kept = stage({**known, **values})
                values.update(kept)
                for name, row in rows.items():
                    tables[name][i].copy_(row)
        if self._batched:
            stacked = {n: torch.stack([v[n] for v in per_step]) for n in stage.inputs if n in per_step[0]}
            rows, kept = stage.batched(known, stacked)
            if time not in self._measured:
                self._measure(time, rows, tables)
            for name, table in rows.items():
                tables[name].copy_(table)
            for i, values in enumerate(per_step):
                values.update({name: value[i] for name, value in kept.items()})

    def _measure(self, time: BindingTime, rows: Tensors, tables: Tensors) -> None:
        """Note how far the batched `rows` are from those in `tables`, which were computed one step at a time."""
        self._measured.add(time)
        differences = [(row.double() - tables[name].double()).abs().max() for name, row in rows.items() if row.numel()]
        self.measured_difference = max([self.measured_difference or 0.0, *map(float, differences)])
