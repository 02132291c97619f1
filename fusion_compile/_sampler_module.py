"""A sampler: the model's place in a sampling loop, its programs by shape, and the weights they let go of."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fusion_compile._conditioning_table import RequestSlot
from fusion_compile._denoiser_graph import Call, invoke, take_apart
from fusion_compile._hoisted_weights import ReleasableWeights
from fusion_compile._roles import Roles, assign_roles, roles_of_names
from fusion_compile._sampler_program import SamplerProgram
from fusion_compile._sampler_report import SamplerReport

MAX_PROGRAMS = 4
"""Shapes that one sampler serves at a time; beyond it the one not used for longest is dropped."""

REQUEST_SLOTS = 2
"""Requests whose rows are kept: a condition and its null, called by turns."""


class Sampler(nn.Module):
    """Call it as the model it was made from; made by `optimize_sampler`.

    `model`: the model. `timesteps`: the schedule, ``[n_steps]`` on the CPU. Attributes that a sampler does not have are
    the model's.
    """

    def __init__(
        self, model: nn.Module, schedule: Tensor, roles: Mapping[str, str] | None, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.eval()
        self.timesteps = schedule
        self._signature = inspect.signature(model.forward)
        self._given_roles = roles
        self._roles: Roles | None = None
        self._options = options
        self._programs: OrderedDict[tuple[Any, ...], SamplerProgram] = OrderedDict()
        self._weights = ReleasableWeights(model)
        self._released = 0
        self._warned: set[str] = set()
        open_ended = any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())
        if not open_ended and (unknown := sorted(set(roles or ()) - set(self._signature.parameters))):
            raise ValueError(
                f"roles name {unknown}, which {type(model).__name__}.forward does not take; its arguments are "
                f"{list(self._signature.parameters)}."
            )
        itself = weakref.ref(self)

        def weights_were_loaded(*_: object) -> None:
            if (sampler := itself()) is not None:
                sampler.invalidate()

        model.register_load_state_dict_post_hook(weights_were_loaded)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output, without gradient.

        A timestep outside the schedule is served by the whole model, which is said once. Raises ValueError for a model
        in training mode or an input that requires a gradient.
        """
        call = take_apart(self._signature, args, kwargs)
        if torch.is_grad_enabled() and (
            names := [o for o, t in zip(call.owners, call.tensors, strict=True) if t.requires_grad]
        ):
            raise ValueError(
                f"{names[0]} requires a gradient, which does not flow through a sampler; call the model itself."
            )
        with torch.inference_mode(False), torch.no_grad():  # tables outlive the caller's inference mode
            return self._forward(call)

    def _forward(self, call: Call) -> Any:
        program = self._program(call)
        step, known, verdict = program.find(call)
        if verdict is False:
            return self._serve_whole(call, program)
        with _no_autocast(call):
            self._follow_weights(program, look=program.watch.must_compare)
            slot = self._slot(program, call)
            return program.run(slot, step, call.tensors, known if verdict is None else None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Do for this call's shapes and request what can be done before the loop; the first call compiles."""
        call = take_apart(self._signature, args, kwargs)
        program = self._program(call)
        with _no_autocast(call):
            self._follow_weights(program, look=True)
            self._slot(program, call)

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
        request) the velocity is ``v_null + guidance_scale * (v - v_null)``. Returns a tensor like `noise`.

        Raises ValueError for a schedule that leaves [0, 1], more than one live argument, or an output unlike `noise`.
        """
        if float(self.timesteps.max()) > 1 or float(self.timesteps.min()) < 0:
            raise ValueError(
                f"sample() integrates a rectified flow with t in [0, 1] and the schedule begins "
                f"{self.timesteps[:3].tolist()}; write the loop of your scheduler around sampler(x, t, ...)."
            )
        if guidance_scale != 1.0 and null is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs null=, the request that stands for no condition.")
        program, calls = self._sampling_calls(noise, request, conditioning, null if guidance_scale != 1.0 else None)
        live = calls[0].owners.index(self._roles.named("live")[0])  # type: ignore[union-attr]
        times = [*self.timesteps.double().tolist(), 0.0]
        x = noise
        with _no_autocast(calls[0]):
            self._follow_weights(program, look=True)
            slots = [self._slot(program, call) for call in calls]
            for i, step in enumerate(program.steps):
                tensors = list(calls[0].tensors)
                tensors[live] = x
                velocities = [_one_tensor_like(noise, program.run(slot, step, tensors)) for slot in slots]
                v = velocities[0]
                if len(velocities) == 2:
                    v = velocities[1] + guidance_scale * (v - velocities[1])
                x = (x - (times[i] - times[i + 1]) * v).to(noise.dtype)
        return x

    def free_hoisted_weights(self, to: Literal["cpu", "drop"] = "drop", *, keep_prologue: bool = False) -> int:
        """Take the weights that no step of the loop reads out of the model's memory; return the bytes given back.

        ``to="cpu"`` keeps them in main memory, where a new request or an unknown timestep fetches them for a moment.
        ``to="drop"`` keeps nothing: the requests that are prepared are still served, others and unknown timesteps raise
        RuntimeError until `restore_weights`. `keep_prologue`: keep what a new request needs. The parameters stay where
        they are in the model, with no elements. Weights that lie in a larger storage cannot be given back and stay;
        a warning says so.
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
        names = frozenset[str]().union(*(p.early_names for p in self._programs.values()))
        for program in self._programs.values():
            names -= program.body_names
            if keep_prologue:
                names -= program.prologue_names
        released = self._weights.release(names, to)
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
            program.table.forget()

    def reports(self) -> tuple[SamplerReport, ...]:
        """What was hoisted and declined, for each combination of shapes seen lately."""
        return tuple(program.report(self._released) for program in self._programs.values())

    def explain(self) -> str:
        """`reports` as text."""
        unseen = (
            f"sampler of {type(self.model).__name__}, {len(self.timesteps)} steps: not called yet, nothing is known"
        )
        return "\n".join(map(str, self.reports())) or unseen

    def _program(self, call: Call) -> SamplerProgram:
        """The program of the call's shapes, made if need be."""
        if self.model.training:
            raise ValueError(f"{type(self.model).__name__} is in training mode; call model.eval() before sampling.")
        program = self._programs.get(call.key)
        if program is not None and (name := program.watch.replaced()) is not None:
            self._say_once("replaced", f"{name} was replaced by another tensor; the sampler is built again.")
            self._programs.clear()
            program = None
        if program is None:
            program = self._build(call)
            self._programs[call.key] = program
            if len(self._programs) > MAX_PROGRAMS:
                self._programs.popitem(last=False)
                self._say_once(
                    "programs",
                    f"the sampler was called with more than {MAX_PROGRAMS} combinations of shapes, dtypes and "
                    f"constants; each is exported and compiled by itself and the one not used for longest is dropped. "
                    f"Pad to fewer shapes.",
                )
        self._programs.move_to_end(call.key)
        return program

    def _build(self, call: Call) -> SamplerProgram:
        self._refuse_if_out("a new shape")
        roles = assign_roles(call.arguments, self._given_roles)
        if roles.guessed and self._roles is None and sys.stderr.isatty():
            print(f"fusion_compile: roles {roles}; pass roles= to say otherwise", file=sys.stderr)
        self._roles = roles
        devices = {
            str(t.device) for t, o in zip(call.tensors, call.owners, strict=True) if roles.by_argument[o] == "live"
        }
        weights = {str(p.device) for p in self.model.parameters()}
        if len(devices | weights) > 1 and weights:
            raise ValueError(
                f"the latent is on {', '.join(sorted(devices))} and {type(self.model).__name__} on "
                f"{', '.join(sorted(weights))}; move them to one device."
            )
        return SamplerProgram(
            self.model, self._signature, call, roles, self.timesteps, n_slots=REQUEST_SLOTS, **self._options
        )

    def _follow_weights(self, program: SamplerProgram, *, look: bool) -> None:
        """Forget tables whose weights changed, and have the schedule's part ready. `look`: compare contents."""
        changed = program.watch.versions_changed() or (look and program.watch.contents_changed())
        if changed:
            program.table.forget()
        if not program.table.is_filled:
            self._refuse_if_out("changed weights")
            program.watch.remember()
            program.table.fill_schedule()

    def _slot(self, program: SamplerProgram, call: Call) -> RequestSlot:
        asked = program.request(call)
        slot = program.table.find_request(asked)
        if slot is None:
            if missing := sorted(self._weights.dropped & program.prologue_names):
                raise RuntimeError(
                    f"a new request needs weights that free_hoisted_weights(to='drop') dropped ({missing[0]} and "
                    f"{len(missing) - 1} more); restore_weights(state_dict) first, or free with keep_prologue=True."
                )
            with self._weights.resident():
                slot = program.table.fill_request(asked)
        return slot

    def _serve_whole(self, call: Call, program: SamplerProgram) -> Any:
        t = call.arguments[self._roles.named("step")[0]]  # type: ignore[union-attr]
        value = t.flatten()[:4].tolist()
        if missing := sorted(self._weights.dropped):
            raise RuntimeError(
                f"timestep {value} is not in the sampler's schedule, and the whole model cannot serve it: "
                f"{missing[0]} and {len(missing) - 1} more were dropped. restore_weights(state_dict) first, or pass "
                f"timesteps= with all values."
            )
        self._say_once(
            "unknown t",
            f"timestep {value} is not in the sampler's schedule of {len(self.timesteps)} steps; the whole model "
            f"serves it, which is slower. Pass timesteps= with the values that the model is given.",
        )
        with self._weights.resident():
            return invoke(self.model, self._signature, call.arguments)

    def _sampling_calls(
        self, noise: Tensor, request: tuple[Any, ...], conditioning: dict[str, Any], null: Any
    ) -> tuple[SamplerProgram, list[Call]]:
        """The call of the first step, and the same with `null` in the place of the request."""
        names = list(self._signature.parameters)
        roles = self._roles.by_argument if self._roles else roles_of_names(names, self._given_roles)
        live = [n for n in names if roles.get(n) == "live"]
        step = [n for n in names if roles.get(n) == "step"]
        if len(live) != 1 or len(step) != 1:
            raise ValueError(
                f"sample() needs one live argument and one timestep among {names} and finds {live} and {step}; pass "
                f"roles=, or write the loop around sampler(x, t, ...)."
            )
        others = [n for n in names if n not in (*live, *step, *conditioning)]
        if len(request) > len(others):
            raise ValueError(f"sample() got {len(request)} requests for the arguments {others}.")
        asked = {**dict(zip(others, request, strict=False)), **conditioning}
        t = self._first_timestep(noise)
        requests = [asked]
        if null is not None:
            places = [n for n in names if n in asked]
            if not isinstance(null, Mapping):
                null = dict(zip(places, null if isinstance(null, tuple) else (null,), strict=False))
            requests.append({**asked, **null})
        calls = [take_apart(self._signature, (), {live[0]: noise, step[0]: t, **r}) for r in requests]
        if len(calls) == 2 and calls[0].key != calls[1].key:
            raise ValueError("null must have the shapes and dtypes of the request it stands for.")
        return self._program(calls[0]), calls

    def _first_timestep(self, noise: Tensor) -> Tensor:
        """``[B]`` of the noise's dtype, or shaped and typed as the timestep was in the last call."""
        first = self.timesteps[0]
        if self._programs:
            t = next(reversed(self._programs.values())).timesteps[0]
            shape = t.shape if t.dim() == 0 else (len(noise), *t.shape[1:])
            return first.to(t.device, t.dtype).expand(shape).clone()
        return first.to(noise.device, noise.dtype).expand(len(noise)).clone()

    def _refuse_if_out(self, why: str) -> None:
        if self._weights.names:
            raise RuntimeError(
                f"{why} needs weights that free_hoisted_weights took out of memory ({min(self._weights.names)} and "
                f"{len(self._weights.names) - 1} more); call restore_weights first."
            )

    def _say_once(self, about: str, sentence: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(sentence, stacklevel=4)


def _one_tensor_like(noise: Tensor, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    if not isinstance(out, Tensor) or out.shape != noise.shape:
        raise ValueError(
            f"the model gives {list(out.shape) if isinstance(out, Tensor) else type(out).__name__} for noise of "
            f"{list(noise.shape)}; sample() needs a velocity of the same shape."
        )
    return out


def _no_autocast(call: Call) -> torch.autocast:
    """Casts were traced into the graph; doing them again would round twice."""
    return torch.autocast(call.tensors[0].device.type, enabled=False)
