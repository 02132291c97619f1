"""A sampler: the model's place in a sampling loop, its programs by shape, and the weights they let go of."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import Call, invoke, take_apart
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.programs import SamplerPrograms
from fusion_compile._sampler.rectified_flow import euler, first_timestep, flow_calls, refuse_other_times
from fusion_compile._sampler.report import SamplerReport
from fusion_compile._sampler.stand_in import StandIn
from fusion_compile._sampler.table.pass_watch import Verify
from fusion_compile._sampler.table.request_slot import RequestSlot
from fusion_compile._sampler.table.step_index import Seen
from fusion_compile._sampler.weights.release import ReleasableWeights
from fusion_compile._say_once import SayOnce
from fusion_compile.passes import BindingTime

_MANY_CHANGES = 4
"""Requests that change in the middle of a schedule until it is said."""


class Sampler(StandIn):
    """Call it as the model it was made from; made by `optimize_sampler`.

    `model`: the model. `timesteps`: the schedule that was given last, ``[n]`` on the CPU, or the preset of `sample`.
    Attributes, parameters and the state dict are the model's (see `StandIn`). Code that asks for the model's class
    (``isinstance(model, ModelMixin)``) must be given ``sampler.model``.
    """

    def __init__(
        self,
        model: nn.Module,
        n_steps: int,
        schedule: Tensor | None,
        roles: Mapping[str, str] | None,
        verify: Verify,
        options: dict[str, Any],
    ) -> None:
        super().__init__(model)
        self.eval()
        self._n_steps, self._schedule, self._is_fixed = n_steps, schedule, schedule is not None
        self._preset = torch.linspace(1, 0, n_steps + 1)[:-1]
        self._options, self._verify = options, verify
        self._weights = ReleasableWeights(model)
        self._released, self._changes = 0, 0
        self._say_once = SayOnce()
        itself = weakref.ref(self)
        self._programs = SamplerPrograms(
            model, self._signature, roles, self._weights, self._say_once, lambda: _options_of(itself())
        )

        def weights_were_loaded(*_: object) -> None:
            for program in () if (sampler := itself()) is None else sampler._programs.values():
                program.forget(program.watch.uncounted())

        model.register_load_state_dict_post_hook(weights_were_loaded)  # type: ignore[no-untyped-call]
        self._passes_on = True

    @property
    def timesteps(self) -> Tensor:
        """The schedule given last, ``[n]`` on the CPU, or the preset ``linspace(1, 0)`` of `sample`."""
        return self._preset if self._schedule is None else self._schedule

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, without gradient.

        A timestep without a row gets one, or, where the schedule was fixed by ``timesteps=``, is served by the whole
        model, which is said once; so are timesteps that differ within a call. Raises ValueError for a model in training
        mode or an input that requires a gradient, RuntimeError if what is asked for needs weights that were dropped.
        """
        call = take_apart(self._signature, args, kwargs)
        if torch.is_grad_enabled() and (
            names := [o for o, t in zip(call.owners, call.tensors, strict=True) if t.requires_grad]
        ):
            raise ValueError(
                f"{names[0]} requires a gradient, which does not flow through a sampler; call the model itself."
            )
        with torch.inference_mode(False), torch.no_grad():  # tables outlive the caller's inference mode
            return self._step(call)

    def _step(self, call: Call) -> Any:
        program = self._program(call)
        slot = program.table.find_request(program.request(call))
        seen = program.see(call, slot)
        if seen is not None and seen.row is None and (self._is_fixed or not seen.even):
            program.passes.missed(fixed=True)
            return self._serve_whole(call, seen)
        with _no_autocast(call.tensors[0].device):
            if seen is None:
                step, known = program.find(call)
                self._follow_weights(program, look=False)
                slot = self._ready(program, call, slot, program.rows())
                return program.run(slot, step, call.tensors, known)
            row = seen.row
            if row is None:
                self._refuse_without_weights(program, program.table.missing(slot, (-1,)), seen.values)
                row = program.learn(call)
            new = slot is None
            slot = slot or self._new_slot(program, call)
            begins = program.passes.seen(row, slot, new=new)
            if new and not begins:
                self._note_changed_request(program, call)
            self._follow_weights(program, look=begins)
            self._ready(program, call, slot, (row, *self._rows_ahead(program)))
            return program.run(slot, program.step(row), call.tensors)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, *args: Any, timesteps: Tensor | Sequence[float] | None = None, **kwargs: Any) -> None:
        """Do what can be done before the loop; the first call or preparation for a shape compiles.

        `timesteps`: the schedule from now on, ``[n]`` with any n, as the model will be given its values; should the
        model have an argument of that name, give that one by position. The others are arguments of a call: all of them,
        or those of a request by name, with which the shapes of the latent are the last call's. Without an earlier call
        a schedule is kept and what it decides is computed at the first.

        Raises ValueError for a schedule that is not one-dimensional, and TypeError for arguments that the model does
        not take or that are missing.
        """
        if timesteps is not None:
            self._schedule = as_schedule(timesteps)
        call = self._programs.completed(args, kwargs)
        for program in self._programs.values() if call is None else (self._program(call),):
            self._place_schedule(program)
            with _no_autocast(program.like.device):
                self._follow_weights(program, look=True)
                if call is None:
                    self._ready_all(program, program.scheduled)
                else:
                    slot = program.table.find_request(program.request(call))
                    self._ready(program, call, slot, program.scheduled or program.rows())

    @torch.inference_mode(False)
    @torch.no_grad()
    def sample(
        self,
        noise: Tensor,
        *request: Any,
        guidance_scale: float = 1.0,
        null: Any = None,
        **conditioning: Any,
    ) -> Tensor:
        """Rectified flow from `noise` to data, Euler steps along the schedule; the loop never waits for the device.

        The model predicts ``v = noise - data`` at ``x_t = (1 - t) data + t noise``; each step is ``x - (t - t_next)
        v``, and the last `t_next` is 0. `request`, `conditioning`: the model's other arguments, in the order of its
        signature or by name. `guidance_scale`: with `null` (one value, or a tuple or dict of them, in the place of the
        request) the velocity is ``v_null + guidance_scale * (v - v_null)``. Returns a tensor like `noise`. Without
        `timesteps` the schedule is ``linspace(1, 0, n_steps + 1)[:-1]``.

        Raises ValueError for a schedule that leaves [0, 1], more than one live argument, or an output unlike `noise`.
        """
        refuse_other_times(self.timesteps)
        if guidance_scale != 1.0 and null is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs null=, the request that stands for no condition.")
        like = self._programs.values()[-1].like if self._programs else None
        name, calls = flow_calls(
            self._signature,
            self._programs.roles,
            noise,
            first_timestep(self.timesteps, noise, like),
            request,
            conditioning,
            null if guidance_scale != 1.0 else None,
        )
        program = self._program(calls[0])
        with _no_autocast(noise.device):
            rows = self._place(program, self.timesteps)
            self._follow_weights(program, look=True)
            slots = [
                self._ready(program, call, program.table.find_request(program.request(call)), rows) for call in calls
            ]
            live = calls[0].owners.index(name)
            tensors = list(calls[0].tensors)

            def velocities(i: int, x: Tensor) -> list[Any]:
                tensors[live] = x
                program.set_timestep(tensors, self.timesteps[i])
                return [program.run(slot, program.step(rows[i]), tensors) for slot in slots]

            return euler(noise, self.timesteps, guidance_scale, velocities)

    def free_hoisted_weights(
        self, to: Literal["cpu", "drop"] = "drop", *, keep_prologue: bool = False, unread: bool = False
    ) -> int:
        """Take the weights that no step of the loop reads out of the model's memory; return the bytes given back.

        ``to="cpu"`` keeps them in main memory, where a new request or an unknown timestep fetches them for a moment.
        ``to="drop"`` keeps nothing: the requests that are prepared are still served at the timesteps that have rows,
        others raise RuntimeError until `restore_weights`. If no timesteps were given and none but those of the preset
        of `sample` were asked for, the preset is completed first. `keep_prologue`: keep what a new request needs.
        `unread`: let go of the weights too on which the output does not depend at all, as of the last text half of
        Qwen-Image; leave it off for a model that has other methods which read them. The parameters stay where they are
        in the model, with no elements. Weights that lie in a larger storage cannot be given back and stay; a warning
        says so.

        Raises ValueError if nothing was hoisted yet, and for ``"drop"`` if no timestep has a row.
        """
        if to not in ("cpu", "drop"):
            raise ValueError(f"to={to!r}; use 'cpu' or 'drop'.")
        if not self._programs:
            raise ValueError(
                "nothing was hoisted yet: call the sampler once, or pass example_inputs to optimize_sampler."
            )
        with torch.inference_mode(False), torch.no_grad():
            for program in self._programs.values():
                self._follow_weights(program, look=True)
                if to == "drop":
                    self._complete(program)
        programs = self._programs.values()
        needed = frozenset[str]().union(*(p.body_names for p in programs))
        if keep_prologue:
            needed = needed.union(*(p.prologue_names for p in programs))
        may_go = frozenset[str]().union(*(p.early_names | (p.unread_names if unread else set()) for p in programs))
        released = self._weights.release(may_go, needed, to)
        for program in self._programs.values():
            program.watch.remember()
        if released.declined:
            name, why = next(iter(released.declined.items()))
            warnings.warn(
                f"{len(released.declined)} hoisted weights stay in memory, {name} because {why}.", stacklevel=2
            )
        self._released += released.bytes
        return released.bytes

    def restore_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Put released weights back: from the CPU, or, if they were dropped, from `state` (full name -> tensor).

        Raises ValueError, changing nothing, if dropped weights are missing in `state`.
        """
        self._weights.restore(state)
        self._released = 0
        self.invalidate()

    def invalidate(self) -> None:
        """Compute every table again at its next use; only writes through ``parameter.data`` in mid-loop need it."""
        for program in self._programs.values():
            program.forget(None)

    def reports(self) -> tuple[SamplerReport, ...]:
        """What was hoisted and declined, for each combination of shapes seen lately."""
        return tuple(program.report(self._released) for program in self._programs.values())

    def explain(self) -> str:
        """`reports` as text."""
        unseen = f"sampler of {type(self.model).__name__}, {self._n_steps} steps: not called yet, nothing is known"
        return "\n".join(map(str, self.reports())) or unseen

    def _program(self, call: Call) -> SamplerProgram:
        program = self._programs.of(call)
        self._place_schedule(program)
        return program

    def _place(self, program: SamplerProgram, schedule: Tensor) -> list[int]:
        """Rows of `program` for `schedule`; RuntimeError if they cannot be computed."""
        if unknown := program.without_row(schedule):
            self._refuse_without_weights(program, (BindingTime.STEP, BindingTime.STEP_REQUEST), unknown[:4])
        return program.place(schedule)

    def _refuse_without_weights(
        self, program: SamplerProgram, stages: Iterable[BindingTime], values: Sequence[float]
    ) -> None:
        self._weights.refuse_if_dropped(
            program.weights_of(stages),
            f"timestep {values} is not in the sampler's schedule of {len(program.rows())} rows, and its own row",
            "prepare all timesteps before weights are dropped",
        )

    def _place_schedule(self, program: SamplerProgram) -> None:
        """Rows for the schedule that was given, once."""
        if self._schedule is not None and program.follows is not self._schedule:
            program.scheduled = self._place(program, self._schedule)
            program.follows = self._schedule

    def _rows_ahead(self, program: SamplerProgram) -> Iterable[int]:
        """Rows to compute together with the one that is asked for: none while they are learned one by one."""
        if self._schedule is not None:
            return program.scheduled
        return () if self._options["exact"] and not self._weights.names else program.rows()

    def _complete(self, program: SamplerProgram) -> None:
        """Compute all that can be served once weights are gone."""
        if self._schedule is None and program.like.is_floating_point() and program.has_only(self._preset):
            program.place(self._preset)
        if not program.rows():
            raise ValueError(
                "no timestep is known yet, so nothing could be served without the weights: call "
                "prepare(timesteps=...), or sample one image, before free_hoisted_weights(to='drop')."
            )
        self._ready_all(program, program.rows())

    def _ready_all(self, program: SamplerProgram, rows: Iterable[int]) -> None:
        """Compute what is missing of `rows` for every request that is kept."""
        for slot in (None, *program.table.live_slots()):
            self._fill(program, slot, rows)

    def _ready(self, program: SamplerProgram, call: Call, slot: RequestSlot | None, rows: Iterable[int]) -> RequestSlot:
        slot = slot or self._new_slot(program, call)
        self._fill(program, slot, rows)
        return slot

    def _new_slot(self, program: SamplerProgram, call: Call) -> RequestSlot:
        self._weights.refuse_if_dropped(program.prologue_names, "a new request", "free with keep_prologue=True")
        return program.table.take_slot(program.request(call))

    def _note_changed_request(self, program: SamplerProgram, call: Call) -> None:
        """Say what changes all the time: serving it as a request is right, and slower than as a live argument."""
        self._changes += 1
        if self._changes == _MANY_CHANGES and (names := program.changed_arguments(call)):
            self._say_once(
                "request",
                f"{', '.join(names)} changed in the middle of a schedule, {_MANY_CHANGES} times so far; what depends "
                f"on it is computed again each time. If it changes at every step, pass roles={{{names[0]!r}: 'live'}}.",
            )

    def _fill(self, program: SamplerProgram, slot: RequestSlot | None, rows: Iterable[int]) -> None:
        rows = list(rows)
        if needed := program.table.missing(slot, rows):
            self._weights.refuse_if_dropped(program.weights_of(needed), "what was changed", "do not change them")
            with self._weights.resident():
                program.table.fill(slot, rows)

    def _follow_weights(self, program: SamplerProgram, *, look: bool) -> None:
        """Forget what changed weights fed. `look`: compare contents too, unless ``verify="never"``."""
        changed = program.watch.versions_changed()
        if self._verify != "never" and (look or self._verify == "always" or program.watch.must_compare):
            changed |= program.watch.contents_changed()
        if changed:
            program.forget(changed)
            program.watch.remember()

    def _serve_whole(self, call: Call, seen: Seen) -> Any:
        about, why = "unknown t", f"is not in the sampler's schedule of {len(self.timesteps)} steps"
        remedy = "Pass timesteps= with the values that the model is given"
        if (covers := self._options["covers"]) is not None:
            about, why = "outside t", f"is outside of [{covers.low:g}, {covers.high:g}], which rank= was fitted to"
            remedy = "Pass t_range= with the first and the last that the model is given"
        elif not seen.even:
            about, why = "uneven t", "differs within one call, and a row of a table is for one timestep"
            remedy = "Call once for each timestep"
        if missing := sorted(self._weights.dropped):
            raise RuntimeError(
                f"timestep {seen.values} {why}, and the whole model cannot serve it: {missing[0]} and "
                f"{len(missing) - 1} more were dropped. restore_weights(state_dict) first. {remedy}."
            )
        self._say_once(about, f"timestep {seen.values} {why}; the whole model serves it, which is slower. {remedy}.")
        with self._weights.resident():
            out = invoke(self.model, self._signature, call.arguments)
        self._programs.model_wrote_to_itself()
        return out


def _options_of(sampler: Sampler | None) -> dict[str, Any]:
    """For `SamplerProgram`; the sampler asks while it is alive."""
    assert sampler is not None
    n_steps = sampler._n_steps if sampler._schedule is None else len(sampler._schedule)
    return {"n_steps": n_steps, "verify": sampler._verify, **sampler._options}


def as_schedule(timesteps: Tensor | Sequence[float]) -> Tensor:
    """``[n]`` on the CPU; ValueError if it has another number of dimensions or no entries."""
    schedule = torch.as_tensor(timesteps).detach().cpu()
    if schedule.dim() != 1 or not len(schedule):
        raise ValueError(f"timesteps has shape {list(schedule.shape)}; a schedule is one value for each step, [n].")
    return schedule


def _no_autocast(device: torch.device) -> torch.autocast:
    """Casts were traced into the graph; doing them again would round twice."""
    return torch.autocast(device.type, enabled=False)
