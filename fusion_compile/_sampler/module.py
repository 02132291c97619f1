"""A sampler as a module: it takes the model's place, chooses a program by shape, and releases weights."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._sampler.call_arguments import refuse_other_forms
from fusion_compile._sampler.graph.call import Call, invoke
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.programs import SamplerPrograms
from fusion_compile._sampler.rectified_flow import euler, first_timestep, flow_calls, refuse_other_times
from fusion_compile._sampler.report import SamplerReport
from fusion_compile._sampler.rows import Found, Learnable, Unserved
from fusion_compile._sampler.schedule import as_schedule, preset
from fusion_compile._sampler.stand_in import StandIn, in_turn
from fusion_compile._sampler.weights.release import ReleasableWeights, destination
from fusion_compile._sampler.weights.unservable import Unservable
from fusion_compile._say_once import SayOnce

_MANY_CHANGES = 4
"""Requests that change in the middle of a schedule before a warning says so."""


class SamplerModule(StandIn):
    """All of a sampler but its explanation; see `fusion_compile.sampler.Sampler`."""

    def __init__(self, model: nn.Module, options: SamplerOptions) -> None:
        super().__init__(model, options.method)
        self.eval()
        self._options = options
        self._preset = preset(options.n_steps)
        self._weights = ReleasableWeights.of(model)
        self._released, self._changes = 0, 0
        self._say_once = SayOnce()
        self._programs = SamplerPrograms(model, self._signature, options, self._weights, self._say_once)
        programs = weakref.ref(self._programs)

        def weights_were_loaded(*_: object) -> None:
            if (known := programs()) is not None:
                known.invalidate_uncounted()

        model.register_load_state_dict_post_hook(weights_were_loaded)  # type: ignore[no-untyped-call]
        self._forwards_attributes = True

    def __deepcopy__(self, memo: dict[int, Any]) -> SamplerModule:
        """A new sampler over a copy of the model. Programs and rows belong to one model, so they are made anew."""
        self._weights.refuse_if_out("a copy of the sampler")
        memo[id(self)] = new = type(self)(copy.deepcopy(self.model, memo), self._options)
        new._programs.schedule = self._programs.schedule
        return new

    def __reduce__(self) -> str:
        raise TypeError(
            "a sampler is compiled programs over one model, and cannot be pickled. Save the model (model.state_dict()) "
            "and make the sampler from it again; copy.deepcopy(sampler) makes one over a copy of the model."
        )

    @property
    def timesteps(self) -> Tensor:
        """The schedule given last, ``[n]`` on the CPU, or the preset ``linspace(1, 0, n_steps + 1)[:-1]``."""
        return self._preset if self._programs.schedule is None else self._programs.schedule

    def _serve(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the model's output, without gradient.

        Args:
            *args: The model's arguments.
            **kwargs: The model's keyword arguments.

        Returns:
            The model's output. A timestep without a row gets one. Where `timesteps` fixed the schedule, the whole model
            serves other timesteps, and it serves timesteps that differ within a call; a warning says so once.

        Raises:
            ValueError: If the model is in training mode or an input requires a gradient.
            RuntimeError: If the call needs weights that were dropped.
        """
        call = self._programs.take(args, kwargs)
        if torch.is_grad_enabled() and (
            names := [o for o, t in zip(call.owners, call.tensors, strict=True) if t.requires_grad]
        ):
            raise ValueError(
                f"{names[0]} requires a gradient, which does not flow through a sampler; call the model itself."
            )
        with torch.inference_mode(False), torch.no_grad():  # tables outlive the caller's inference mode
            return self._denoise(call)

    def _denoise(self, call: Call) -> Any:
        try:
            program = self._programs.of(call)
        except Unservable as now:
            return self._serve_unservable(call, now)
        slot = program.find_request(call)
        located = program.locate(call, slot)
        if isinstance(located, Unserved):
            return self._serve_whole(call, located)
        with _no_autocast(call.tensors[0].device):
            if isinstance(located, Found):
                program.follow_weights(look=False)
                slot = program.prepare_request(call, slot, program.rows_in_use())
                return program.denoise(slot, located.row, call.tensors, located.known, call.given)
            row = program.learn_timestep(call, slot, located) if isinstance(located, Learnable) else located.row
            new = slot is None
            slot = slot or program.open_request(call)
            starts = program.starts_trajectory(row, slot, new=new)
            if new and not starts:
                self._note_changed_request(program, call)
            if program.follow_weights(look=starts):
                return self._denoise(call)  # another program may serve
            program.compute_rows(slot, (row, *program.rows_ahead()))
            return program.denoise(slot, program.row_index(row), call.tensors, given=call.given)

    @in_turn
    def prepare(
        self,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        timesteps: Tensor | Sequence[float] | None = None,
    ) -> None:
        """Do the work ahead of the loop; the first call or preparation for a shape compiles.

        Args:
            args: Positional arguments of a call, as `torch.export.export` takes them.
            kwargs: Keyword arguments of a call. The arguments of a request alone are enough after a first call: the
                latent then has the shape of the last call's.
            timesteps: The schedule from now on, ``[n]`` with any n, as the model will be given its values. Without an
                earlier call it is kept, and its rows are computed at the first call.

        Raises:
            ValueError: If the schedule is not one-dimensional, or the dtype of the timestep cannot hold it.
            TypeError: If `args` is no tuple, or arguments are missing or unknown to the model.
            RuntimeError: If the work needs weights that were dropped.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def forward(self, x, t):
            ...         return x * t[:, None]
            >>> sampler = fc.optimize_sampler(Model().eval(), 4, mode="eager")
            >>> sampler.prepare((torch.zeros(2, 3), torch.ones(2)), timesteps=[0.9, 0.5, 0.1])
            >>> len(sampler.timesteps)
            3
        """
        kwargs = {} if kwargs is None else kwargs
        refuse_other_forms(args, kwargs, "prepare")
        call = self._programs.complete_call(args, kwargs)
        with self._programs.changing_schedule(None if timesteps is None else as_schedule(timesteps)) as programs:
            for program in programs.values() if call is None else (programs.of(call),):
                program.follow_schedule(programs.schedule)
                with _no_autocast(program.like.device):
                    program.follow_weights(look=True)
                    if call is None:
                        program.prepare_schedule()
                    else:
                        program.prepare_request(call, program.find_request(call), program.scheduled_rows())

    @in_turn
    def sample(
        self,
        noise: Tensor,
        *request: Any,
        guidance_scale: float = 1.0,
        unconditional: Any = None,
        **conditioning: Any,
    ) -> Tensor:
        """Integrate a rectified flow from `noise` to data with Euler steps along the schedule.

        The model predicts the velocity ``v = noise - data`` at ``x_t = (1 - t) data + t noise`` (Liu et al. 2022,
        arXiv:2209.03003, with time reversed). Each step is ``x - (t - t_next) v``, and the last `t_next` is 0. The loop
        never waits for the device.

        Args:
            noise: The latent at the first timestep, ``[B, ...]``.
            *request: The model's other arguments, in the order of its signature.
            guidance_scale: 1 is no guidance. Otherwise the velocity is ``v_u + guidance_scale * (v - v_u)``, where
                ``v_u`` is the model's for `unconditional` (Ho and Salimans 2022, arXiv:2207.12598).
            unconditional: The request without a condition, of the same shapes: one value, or a tuple or dictionary of
                them, in place of the request.
            **conditioning: The model's other arguments by name.

        Returns:
            A tensor of the shape and dtype of `noise`.

        Raises:
            ValueError: If the schedule leaves [0, 1], if there is not exactly one live argument and one timestep, if
                the output is unlike `noise`, or if guidance lacks `unconditional`.
            RuntimeError: If the work needs weights that were dropped.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def forward(self, x, t):
            ...         return x * t[:, None]
            >>> sampler = fc.optimize_sampler(Model().eval(), 4, mode="eager")
            >>> sampler.sample(torch.randn(2, 3)).shape
            torch.Size([2, 3])
        """
        refuse_other_times(self.timesteps)
        if guidance_scale != 1.0 and unconditional is None:
            raise ValueError(
                f"guidance_scale={guidance_scale} needs unconditional=, the request that stands for no condition."
            )
        like = self._programs.values()[-1].like if self._programs else None
        name, calls = flow_calls(
            self._signature,
            self._programs.roles,
            noise,
            first_timestep(self.timesteps, noise, like),
            request,
            conditioning,
            unconditional if guidance_scale != 1.0 else None,
            self._programs.call_named,
        )
        program = self._programs.of(calls[0])
        with _no_autocast(noise.device):
            rows = program.assign_rows(self.timesteps)
            program.follow_weights(look=True)
            slots = [program.prepare_request(call, program.find_request(call), rows) for call in calls]
            live = calls[0].owners.index(name)
            tensors = list(calls[0].tensors)

            def velocities(i: int, x: Tensor) -> list[Any]:
                tensors[live] = x
                program.set_timestep(tensors, self.timesteps[i])
                return [program.denoise(slot, program.row_index(rows[i]), tensors) for slot in slots]

            return euler(noise, self.timesteps, guidance_scale, velocities)

    @in_turn
    def release_weights(self, to: str | torch.device, *, keep_prologue: bool = False, unread: bool = False) -> int:
        """Take the weights that no step of the loop reads out of memory.

        The parameters stay where they are in the model, with no elements. Weights that lie in a larger storage, or
        whose memory something else holds, stay; a warning says so. If no timesteps were given and only timesteps of the
        preset of `sample` were asked for, ``to="drop"`` computes the rest of the preset first.

        Args:
            to: A device such as ``"cpu"`` keeps the contents there, and a new request or an unknown timestep fetches
                them for a moment. ``"drop"`` keeps nothing: prepared requests are still served at the timesteps that
                have rows, and everything else raises RuntimeError until `restore_weights`.
            keep_prologue: Keep the weights that a new request needs.
            unread: Release also the weights on which the output does not depend (the last text half of Qwen-Image).
                Leave it off for a model with other methods that read them.

        Returns:
            The bytes given back on the model's device. On CUDA they are the allocator's count, elsewhere the size of
            the storages that nothing holds any more. What the table holds of these very weights is taken off: a model
            that normalises its weights in each forward has the normalised ones there.

        Raises:
            ValueError: If `to` is neither "drop" nor a device with memory, if nothing was hoisted yet, or, for
                "drop", if no timestep has a row.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.time = torch.nn.Linear(1, 3)
            ...     def forward(self, x, t):
            ...         return x * self.time(t[:, None])
            >>> x, t = torch.zeros(2, 3), torch.ones(2)
            >>> sampler = fc.optimize_sampler(Model().eval(), 4, mode="eager", example_inputs=(x, t))
            >>> sampler.release_weights(to="drop")  # a weight [3, 1] and a bias [3], four bytes each
            24
        """
        device, programs = destination(to), self._programs.values()
        if not self._programs:
            raise ValueError(
                "nothing was hoisted yet: call the sampler once, or pass example_inputs to optimize_sampler."
            )
        for program in programs:
            program.follow_weights(look=True)
            if device is None:
                program.complete(self._preset)
        needed = frozenset[str]().union(*(p.body_names for p in programs))
        if keep_prologue:
            needed = needed.union(*(p.prologue_names for p in programs))
        may_go = frozenset[str]().union(*(p.early_names | (p.unread_names if unread else set()) for p in programs))
        released = self._weights.release(may_go, needed, device)
        for program in programs:
            program.accept_weights()
        if released.declined:
            name, why = next(iter(released.declined.items()))
            warnings.warn(
                f"{len(released.declined)} hoisted weights stay in memory, {name} because {why}.", stacklevel=2
            )
        net = max(0, released.bytes - sum(program.copies_of(self._weights.names) for program in programs))
        self._released += net
        return net

    @in_turn
    def restore_weights(self, state: Mapping[str, Tensor] | None = None) -> None:
        """Put released weights back.

        Args:
            state: Full name -> tensor, for weights that were dropped. Others come from the device they were moved to.

        Raises:
            ValueError: If a dropped weight is missing in `state`; nothing has changed then.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def __init__(self):
            ...         super().__init__()
            ...         self.time = torch.nn.Linear(1, 3)
            ...     def forward(self, x, t):
            ...         return x * self.time(t[:, None])
            >>> x, t = torch.zeros(2, 3), torch.ones(2)
            >>> model = Model().eval()
            >>> checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            >>> sampler = fc.optimize_sampler(model, 4, mode="eager", example_inputs=(x, t))
            >>> released = sampler.release_weights(to="drop")
            >>> sampler.restore_weights(checkpoint)
            >>> model.time.weight.shape
            torch.Size([3, 1])
        """
        self._weights.restore(state)
        self._released = 0
        self.invalidate()

    @in_turn
    def invalidate(self) -> None:
        """Compute every table again at its next use.

        Only a write through ``parameter.data`` in the middle of a trajectory needs it; every other change is followed.

        Example:
            >>> import torch, fusion_compile as fc
            >>> class Model(torch.nn.Module):
            ...     def forward(self, x, t):
            ...         return x * t[:, None]
            >>> fc.optimize_sampler(Model().eval(), 4, mode="eager").invalidate()
        """
        for program in self._programs.values():
            program.invalidate(None)

    @property
    @in_turn
    def report(self) -> SamplerReport:
        """What was hoisted and declined, for each combination of shapes seen lately; print it to read it."""
        programs = tuple(program.report(self._released) for program in self._programs.values())
        return SamplerReport(type(self.model).__name__, self._options.n_steps, programs)

    def _note_changed_request(self, program: SamplerProgram, call: Call) -> None:
        """Warn of a request that keeps changing: served as a request it is correct, and slow."""
        self._changes += 1
        if self._changes == _MANY_CHANGES and (names := program.changed_arguments(call)):
            self._say_once(
                "request",
                f"{', '.join(names)} changed in the middle of a schedule, {_MANY_CHANGES} times so far; what depends "
                f"on it is computed again each time. If it changes at every step, pass roles={{{names[0]!r}: 'live'}}.",
            )

    def _runs_unhoisted(self, name: str) -> None:
        self._say_once(
            f"method {name}",
            f"{type(self.model).__name__}.{name} is the model's own method, and nothing in it is hoisted. Make a "
            f"sampler of it: optimize_sampler(model, n_steps, method={name!r}).",
        )

    def _serve_unservable(self, call: Call, why: Unservable) -> Any:
        """Call the model, which was offloaded, quantised or given a cache after the sampler was made."""
        self._weights.refuse_if_out(f"{why} The whole model would serve, which")
        self._say_once("unservable", f"{why} Meanwhile the whole model serves, and nothing is hoisted.")
        out = invoke(self.model, call, call.given)
        if why.of_the_call:
            self._programs.accept_structure()
        return out

    def _serve_whole(self, call: Call, unserved: Unserved) -> Any:
        values, why, remedy = unserved.values, unserved.why, unserved.remedy
        if missing := sorted(self._weights.dropped):
            raise RuntimeError(
                f"timestep {values} {why}, and the whole model cannot serve it: {missing[0]} and "
                f"{len(missing) - 1} more were dropped. restore_weights(state_dict) first. {remedy}."
            )
        self._say_once(
            unserved.topic, f"timestep {values} {why}; the whole model serves it, which is slower. {remedy}."
        )
        with self._weights.resident():
            out = invoke(self.model, call, call.given)
        self._programs.accept_structure()
        return out


def _no_autocast(device: torch.device) -> torch.autocast:
    """Casts were traced into the graph; doing them again would round twice."""
    return torch.autocast(device.type, enabled=False)
