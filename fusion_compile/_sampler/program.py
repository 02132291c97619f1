"""One denoiser at one shape: graph, split, table, compiled body."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._program.lower import resolve_mode
from fusion_compile._progress import stage
from fusion_compile._sampler.facts import sampler_facts
from fusion_compile._sampler.graph.call import Call
from fusion_compile._sampler.graph.export import DenoiserGraph
from fusion_compile._sampler.graph.roles import BINDING_TIMES, Roles
from fusion_compile._sampler.loop_body import loop_body
from fusion_compile._sampler.rank.fit import RankConditioning
from fusion_compile._sampler.rank.range_rows import CallCount, RangeIndex, TimestepRange
from fusion_compile._sampler.report import SamplerReport
from fusion_compile._sampler.table.conditioning_table import ConditioningTable, bind_weights
from fusion_compile._sampler.table.pass_watch import PassWatch, Verify
from fusion_compile._sampler.table.request_slot import RequestSlot
from fusion_compile._sampler.table.step_index import Seen, StepIndex, UnknownTimestep
from fusion_compile._sampler.weights.weight_watch import WeightWatch
from fusion_compile.passes import BindingTime, hoist_time_conditioning, lay_out_residuals
from fusion_compile.passes._compat import tree_map, tree_unflatten

MOST_SCHEDULES = 4
"""Schedules' worth of rows that a table grows to."""


class SamplerProgram:
    """Serves every call whose `Call.key` is that of the call it was built from.

    `early_names`, `body_names`, `unread_names`: full names of the weights that the stages read, that the body reads,
    and that the output does not depend on. `index`: which timesteps have rows, at first none; `follows`, `scheduled`:
    the schedule that was placed last, and its rows, for the owner's use. `like`: the timestep it was built with.
    `split`: for explain, the whole graph, its inputs' binding times and its weights' full names, and what was made of
    it. `report()`: what was done.
    """

    def __init__(
        self,
        model: nn.Module,
        trace: Callable[[Call], DenoiserGraph],
        call: Call,
        roles: Roles,
        n_steps: int,
        *,
        exact: bool,
        mode: str | None,
        backend: str,
        byte_budget: int | None,
        n_slots: int,
        verify: Verify,
        rank: int | None = None,
        covers: TimestepRange | None = None,
    ) -> None:
        self._model_name = type(model).__name__
        self._roles, self._exact = roles, exact
        by_role = [roles.by_argument[owner] for owner in call.owners]
        self._at = {role: [i for i, r in enumerate(by_role) if r == role] for role in BINDING_TIMES}
        t = call.tensors[self._at["step"][0]]
        device = call.tensors[self._at["live"][0]].device
        self._mode = resolve_mode(mode, device)
        with stage(f"splitting {self._model_name}"):
            traced = trace(call)
            self._structure = traced.structure
            times = {n: BINDING_TIMES[r] for n, r in zip(traced.inputs, by_role, strict=True)}
            graph_module, self.rank = traced.graph_module, None
            if rank is not None and covers is not None:
                self.rank = RankConditioning(rank, covers, t)
                graph_module, times = self.rank.factor(graph_module, times)
            hoisted = hoist_time_conditioning(graph_module, times, n_steps=n_steps, byte_budget=byte_budget)
        body = hoisted.body.graph_module
        buffers = lay_out_residuals(body, hoisted.residuals)
        self.like, self._n_steps, self._device = t.detach(), n_steps, device
        self.index: StepIndex | RangeIndex = StepIndex(t, n_steps, MOST_SCHEDULES * n_steps)
        self.passes: PassWatch | CallCount = PassWatch(look_always=t.device.type == "cpu", verify=verify)
        if self.rank is not None:
            self.index, self.passes = RangeIndex(self.rank.covers), CallCount(n_steps)
        self._example = {
            name: tree_map(lambda leaf: leaf.detach().to("meta") if isinstance(leaf, Tensor) else leaf, value)
            for name, value in call.arguments.items()
        }
        self.follows: Tensor | None = None
        self.scheduled: list[int] = []
        self._steps: list[Tensor] = []
        self.table = ConditioningTable(
            hoisted,
            buffers,
            traced.weights,
            traced.inputs[self._at["step"][0]],
            n_steps,
            batched=not exact,
            n_slots=n_slots,
            mode=self._mode,
            backend=backend,
        )
        left = bind_weights(body, {**traced.weights, **self.table.residuals()})
        self._live = tuple(map(traced.inputs.index, left))
        self._body_graph = body
        self.split = (graph_module, times, traced.full_names, hoisted)
        self._body = loop_body(body, [call.tensors[i] for i in self._live], mode=self._mode, backend=backend)
        self._request_names = tuple(traced.inputs[i] for i in self._at["request"])

        self._names = names = traced.full_names
        self._reads = {
            time: frozenset(names[n] for n in part.inputs if n in names) for time, part in hoisted.stages.items()
        }
        self.body_names = frozenset(names[n] for n in hoisted.body.inputs if n in names)
        self.prologue_names = self.weights_of((BindingTime.REQUEST, BindingTime.STEP_REQUEST))
        self.early_names = self.weights_of(hoisted.stages)
        self.unread_names = frozenset(names.values()) - self.early_names - self.body_names
        read = {names[n]: weight for n, weight in traced.weights.items() if n in names}
        self.watch = WeightWatch({name: read[name] for name in self.early_names})
        self._facts = sampler_facts(
            model_name=self._model_name,
            call=call,
            roles=roles,
            traced=traced,
            hoisted=hoisted,
            buffers=buffers,
            n_steps=n_steps,
            mode=self._mode,
            exact=exact,
            byte_budget=byte_budget,
        )

    @property
    def not_captured(self) -> str | None:
        """Why the body is not the CUDA graph that its mode asks for, if it is not."""
        return self._body.not_captured

    def request(self, call: Call) -> dict[str, Tensor]:
        """The request's tensors of `call` by input name."""
        return {name: call.tensors[i] for name, i in zip(self._request_names, self._at["request"], strict=True)}

    def changed_arguments(self, call: Call) -> tuple[str, ...]:
        """The arguments of the request in which `call`, whose slot was just taken, differs from the request before."""
        slots = self.table.live_slots()
        if len(slots) < 2:
            return ()
        before, now = slots[-2:]
        owners = [call.owners[i] for i in self._at["request"]]
        differs = [
            owner
            for name, owner in zip(self._request_names, owners, strict=True)
            if not torch.equal(before.known[name], now.known[name])
        ]
        return tuple(dict.fromkeys(differs))

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` and, where left out, what the call that this was built from had: latents and timestep (zeros of their
        shape) and constants.

        Raises TypeError if a tensor of the request is left out.
        """
        arguments = {**self._example, **given}
        if lacking := [n for n in self._roles.named("request") if n not in given]:
            raise TypeError(f"prepare() lacks {lacking} of the request, with which the model was last called.")
        return {
            name: value if name in given else tree_map(lambda leaf: _zeros_like(leaf, self._device), value)
            for name, value in arguments.items()
        }

    def weights_of(self, stages: Iterable[BindingTime]) -> frozenset[str]:
        """Full names of the weights that `stages` read."""
        return frozenset[str]().union(*(self._reads.get(time, ()) for time in stages))

    def forget(self, changed: Iterable[str] | None) -> None:
        """The weights `changed` are others than before: what they feed is computed again when it is needed. None: all
        is."""
        if changed is None:
            self.table.forget()
        else:
            changed = set(changed)
            self.table.forget(time for time, read in self._reads.items() if read & changed)
        if self.rank is not None and changed != set():
            self.rank.forget()

    def rebind(self, tensors: Mapping[str, Tensor]) -> bool:
        """Read `tensors` (full name -> tensor) in the places of those of these names; False, with nothing done, if the
        program cannot."""
        if self.rank is not None:
            return False
        for node, name in self._names.items():
            for module in (self._body_graph, *self.table.modules()) if name in tensors else ():
                for held in (module._parameters, module._buffers):
                    if node in held:
                        held[node] = tensors[name]  # type: ignore[assignment]
        self.watch.replace(tensors)
        self.forget(tensors)
        return True

    def see(self, call: Call, slot: RequestSlot | None) -> Seen | None:
        """What the host sees in the timestep of `call`, which is for `slot`; None if it trusts its caller."""
        if not self.passes.must_look(slot, len(self.index)):
            return None
        return self.index.look(call.tensors[self._at["step"][0]])

    def find(self, call: Call) -> tuple[Tensor, Tensor]:
        """``(row [1], known [])`` for the timestep of `call`, found on the device.

        Raises RuntimeError when an earlier call, made on trust, asked for a timestep without a row.
        """
        self.passes.trusted()
        try:
            return self.index.find(call.tensors[self._at["step"][0]])
        except UnknownTimestep:
            self.passes.distrust()
            raise

    def step(self, row: int) -> Tensor:
        """`row` as ``[1]`` int64 on the device of the latent."""
        while len(self._steps) <= row:
            self._steps.append(torch.tensor([len(self._steps)], device=self._device))
        return self._steps[row]

    def set_timestep(self, tensors: list[Tensor], t: Tensor) -> None:
        """Put the value `t` ``[]`` in its place among the `tensors` of a call, if the body reads it: in rank mode."""
        if self.rank is not None:
            at = self._at["step"][0]
            tensors[at] = torch.full_like(tensors[at], t.item())

    def rows(self) -> range:
        """All rows in use."""
        return range(len(self.index))

    def learn(self, call: Call) -> int:
        """A row for the timestep of `call`, which has none; nothing is computed yet."""
        self.passes.missed(fixed=False)
        return self._place(call.tensors[self._at["step"][0]], ())

    def without_row(self, schedule: Tensor) -> list[float]:
        """The values of `schedule` ``[n]`` that have no row; ValueError if the dtype of the timestep cannot hold it."""
        values = cast_schedule(schedule, self.like)
        return [float(value) for value in values if self.index.row_of(value) is None]

    def place(self, schedule: Tensor) -> list[int]:
        """Rows for the values of `schedule` ``[n]`` on the CPU, as the model gets them; equal values have one row.

        Raises ValueError if the dtype of the timestep cannot hold them.
        """
        values = cast_schedule(schedule, self.like)
        self.index.make_room(len(values), MOST_SCHEDULES * max(self._n_steps, len(values)))
        kept = {row for value in values if (row := self.index.row_of(value)) is not None}
        rows = []
        for value in values:
            row = self.index.row_of(value)
            if row is None:
                row = self._place(value.to(self.like.device).expand(self.like.shape), kept)
                kept.add(row)
            rows.append(row)
        return rows

    def has_only(self, schedule: Tensor) -> bool:
        """Whether no row is for a timestep outside of `schedule` ``[n]``."""
        values = schedule.to(self.like.dtype)
        return len({self.index.row_of(value) for value in values} - {None}) == len(self.index)

    def _place(self, t: Tensor, kept: Iterable[int]) -> int:
        row = self.index.place(t, set(kept))
        self.table.place(row, t, self.index.capacity)
        return row

    def run(self, slot: RequestSlot, step: Tensor, tensors: Sequence[Tensor], known: Tensor | None = None) -> Any:
        """The model's output at row `step` of `slot`; NaN where `known` ``[]`` is given and False.

        `tensors`: the tensors of a call; only live ones are read.
        """
        self.table.select(slot, step)
        out = self._body.run(*(tensors[i] for i in self._live))
        if known is not None:
            out = [torch.where(known, o, torch.nan) if o.is_floating_point() else o for o in out]
        return tree_unflatten(list(out), self._structure)

    def report(self, released: int) -> SamplerReport:
        """What was hoisted and declined."""
        facts = dict(self._facts)
        if self.rank is not None:
            facts |= {"rank": self.rank.report(), "declined": (*self.rank.declined, *facts["declined"])}
        return SamplerReport(
            **facts,
            measured_difference=self.table.measured_difference,
            released=released,
            regions=self._body.repeated,
            replay=self.not_captured or ("the loop's body is one CUDA graph" if self._body.captured else ""),
        )


def cast_schedule(schedule: Tensor, t: Tensor) -> Tensor:
    """`schedule` ``[n]`` on the CPU in the dtype of `t`; ValueError if an integer dtype cannot hold it."""
    cast = schedule.to(t.dtype)
    if not t.is_floating_point() and not torch.equal(cast.to(schedule.dtype), schedule):
        raise ValueError(
            f"the timestep is {t.dtype} and the schedule {schedule[:3].tolist()}… holds fractions; pass timesteps= "
            f"with the integers that the scheduler gives to the model."
        )
    return cast


def _zeros_like(leaf: Any, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=device).zero_()
