"""The programs of one model, one for each combination of shapes, and the structure they were made from."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from fusion_compile._capture.watch.scope import SAMPLER
from fusion_compile._capture.watch.watch import Watch
from fusion_compile._progress import stage
from fusion_compile._sampler.conditioning import Rank
from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import (
    Call,
    CallKey,
    named_arguments,
    sees_keywords,
    take_apart,
    what_varies,
    with_tensors_for,
)
from fusion_compile._sampler.graph.number_clock import refuse_other_numbers
from fusion_compile._sampler.graph.roles import Roles, assign_roles, roles_of_names
from fusion_compile._sampler.options import SamplerOptions
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.rank.fit import RankConditioning
from fusion_compile._sampler.split import SplitDenoiser, split_denoiser
from fusion_compile._sampler.weights.release import ReleasableWeights
from fusion_compile._sampler.weights.unservable import Unservable, refuse_unservable
from fusion_compile._say_once import SayOnce

MAX_PROGRAMS = 4
"""Shapes that one sampler serves at a time; beyond it the least recently used program is dropped."""


class SamplerPrograms:
    """Programs by call, the one used last at the end; `len()` of them are kept.

    `schedule`: the timesteps ``[n]`` that all programs follow, or None while they learn. Raises ValueError for roles of
    arguments that the model does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: inspect.Signature,
        options: SamplerOptions,
        weights: ReleasableWeights,
        say_once: SayOnce,
    ) -> None:
        self._model, self._signature, self._options = model, signature, options
        self._weights, self._say_once = weights, say_once
        self.schedule: Tensor | None = options.schedule
        self._roles: Roles | None = None
        self._programs: OrderedDict[tuple[CallKey, int], SamplerProgram] = OrderedDict()
        self._built: Counter[CallKey] = Counter()
        self._unservable: dict[CallKey, Unservable] = {}
        self._graphs = GraphsByShape(model, say_once)
        self._structure: Watch | None = None
        open_ended = any(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in signature.parameters.values())
        if not open_ended and (unknown := sorted(set(options.roles or ()) - set(signature.parameters))):
            raise ValueError(
                f"roles name {unknown}, which {type(model).__name__}.{options.method} does not take; its arguments are "
                f"{list(signature.parameters)}."
            )

    def __len__(self) -> int:
        return len(self._programs)

    def values(self) -> tuple[SamplerProgram, ...]:
        """The programs, the one used last at the end."""
        return tuple(self._programs.values())

    @property
    def roles(self) -> Mapping[str, str]:
        """Argument -> role: as assigned for the first call, or, before it, as the names alone suggest."""
        if self._roles is not None:
            return self._roles.by_argument
        return roles_of_names(list(self._signature.parameters), self._options.roles)

    def of(self, call: Call) -> SamplerProgram:
        """The program of the call's shapes, built if need be, with rows for the schedule.

        Raises ValueError for a model in training mode or on another device than the call, `Unservable` for one that
        was offloaded, quantised or given a cache since, RuntimeError if a program must be built, or rows computed,
        while weights are out of memory.
        """
        self._follow_structure()
        if (known := self._unservable.get(call.key)) is not None:
            raise known.with_traceback(None)
        place = self._place_of(call)
        if place is None:
            refuse_unservable(self._model)
            try:
                _refuse_unknown(call)
                program = self._build(call)
            except Unservable as found:  # of this call: the next one need not trace again
                self._unservable[call.key] = found
                found.of_the_call = True
                self._structure = self._structure or Watch({"": self._model}, scope=SAMPLER)
                raise
            place = (call.key, self._built[call.key])
            self._built[call.key] += 1
            self._programs[place] = program
            outside = {slot.identity: slot for p in self.values() for slot in p.split.traced.outside}
            self._structure = Watch({"": self._model}, scope=SAMPLER, outside=outside.values())
            if len(self._programs) > MAX_PROGRAMS:
                varying = (
                    what_varies(key for key, _ in self._programs) or f"the values read at {program.specialised.where}"
                )
                self._say_once(
                    "programs",
                    f"the sampler was called with more than {MAX_PROGRAMS} combinations of shapes, dtypes and "
                    f"constants ({varying}); each is compiled by itself, and the least recently "
                    f"used one is dropped. Pad to fewer shapes.",
                )
                self._programs.popitem(last=False)
        self._programs.move_to_end(place)
        program = self._programs[place]
        program.follow_schedule(self.schedule)
        return program

    def _place_of(self, call: Call) -> tuple[CallKey, int] | None:
        """Where the program of `call` is, or None if there is none yet.

        Raises `Unservable` if calls of this key have read too many values from tensors.
        """
        alike = [place for place in reversed(self._programs) if place[0] == call.key]
        for place in alike:
            if self._programs[place].specialised.fits(call):
                return place
        if alike and self._built[call.key] >= (specialised := self._programs[alike[0]].specialised).most:
            raise Unservable(
                f"{type(self._model).__name__} reads a value from a tensor at {specialised.where}, which decides what "
                f"is computed; there were {self._built[call.key]} values so far, and each has a program of its own. "
                f"Call it with fewer."
            )
        return None

    def take(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Take a call apart, with a tensor in place of a timestep that is a Python number.

        Raises TypeError as the model would. A number counts as the timestep by its role, or, where no tensor has that
        role, by its name.
        """
        method = self._options.method
        call = take_apart(self._signature, args, kwargs, keywords_matter=sees_keywords(self._model, method))
        call = replace(call, method=method)
        roles = roles_of_names(list(call.arguments), self._options.roles)
        clocks = [name for name, role in roles.items() if role == "step"]
        if any(owner in clocks for owner in call.owners):
            clocks = [name for name in clocks if (self._options.roles or {}).get(name) == "step"]
        return with_tensors_for(call, clocks)

    def complete_call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """A call with these arguments, completed from the last call if they name a request alone.

        None if there are no arguments, or no call to complete them from.
        """
        given, _ = named_arguments(self._signature.bind_partial(*args, **kwargs), kwargs)
        if given and any(role in ("live", "step") and name not in given for name, role in self.roles.items()):
            if not self._programs:
                return None
            return self.call_named(self.values()[-1].complete_arguments(given))
        if not given:
            return None
        return self.take(args, kwargs)

    def call_named(self, arguments: Mapping[str, Any], by_keyword: Collection[str] = ()) -> Call:
        """The call with `arguments` (name -> value), each by position or keyword as in the last call.

        Without a last call, all are by position as far as the signature allows, except those in `by_keyword`.
        """
        positional: list[str] = []
        for name in self.values()[-1].split.call.positional if self._programs else self._signature.parameters:
            if name not in arguments or (name in by_keyword and not self._programs):
                break
            positional.append(name)
        args = tuple(arguments[name] for name in positional)
        kwargs = {name: value for name, value in arguments.items() if name not in positional}
        return self.take(args, kwargs)

    @contextlib.contextmanager
    def changing_schedule(self, schedule: Tensor | None) -> Iterator[SamplerPrograms]:
        """Follow `schedule` ``[n]`` from now on, unless the block raises; None keeps the schedule."""
        before = self.schedule
        self.schedule = before if schedule is None else schedule
        try:
            yield self
        except BaseException:
            self.schedule = before
            raise

    def accept_structure(self) -> None:
        """The model itself was called: whatever it changed in itself is no change of the model."""
        if self._structure is not None:
            self._structure.accept()

    def invalidate_uncounted(self) -> None:
        """A state dict was loaded: invalidate what weights that count no versions feed."""
        for program in self.values():
            program.invalidate_uncounted()

    def _follow_structure(self) -> None:
        """Read replaced parameters; drop all programs if the model is no longer the one that was traced."""
        if self._structure is None or (change := self._structure.changed()) is None:
            return
        refuse_unservable(self._model)
        self._refuse_training()
        self._unservable.clear()
        tensors = change.tensors
        if tensors is not None and all(program.rebind(tensors) for program in self.values()):
            self._weights.were_replaced(tensors)
            self._structure.remember()
            return
        fact = change.fact().removesuffix(".")
        self._weights.refuse_if_out(f"{fact}; building the sampler again")
        self._say_once("structure", f"{fact}; the sampler is built again.")
        self._programs.clear()
        self._built.clear()
        self._unservable.clear()
        self._graphs.drop_all()
        self._structure = None

    def _build(self, call: Call) -> SamplerProgram:
        self._weights.refuse_if_dropped(
            self._weights.names, "the table of a new shape", "prepare every shape before weights are dropped"
        )
        if call.numbers:
            with self._weights.resident():
                refuse_other_numbers(self._model, call)
        self._refuse_training()
        roles = assign_roles(call.arguments, self._options.roles)
        if roles.guessed and self._roles is None and sys.stderr.isatty():
            print(f"fusion_compile: roles {roles}; pass roles= to say otherwise", file=sys.stderr)
        self._roles = roles
        name = type(self._model).__name__
        self._refuse_other_devices(call, roles)
        with self._weights.resident():
            program = SamplerProgram(name, self._split(call, roles), self._options, self._weights)
        self._weights.refuse_if_out_among(program.body_names, "the loop at this shape")
        if program.not_captured is not None:
            self._say_once(
                "replay",
                f"the loop of {name} runs kernel by kernel, not as a CUDA graph: {program.not_captured.rstrip('.')}. "
                f"Pass mode='max-autotune-no-cudagraphs' to say that this is meant.",
            )
        return program

    def _split(self, call: Call, roles: Roles) -> SplitDenoiser:
        """The graph of `call`, split for the schedule that is followed now."""
        options = self._options
        n_steps = options.n_steps if self.schedule is None else len(self.schedule)
        with stage(f"splitting {type(self._model).__name__}"):
            traced = self._graphs.of(call)
            return split_denoiser(
                traced,
                call,
                roles,
                n_steps=n_steps,
                byte_budget=options.byte_budget,
                rank=_rank_conditioning(options, call, roles),
            )

    def _refuse_other_devices(self, call: Call, roles: Roles) -> None:
        latents = {
            str(t.device) for t, o in zip(call.tensors, call.owners, strict=True) if roles.by_argument[o] == "live"
        }
        weights = {str(p.device) for p in self._model.parameters()}
        if len(latents | weights) > 1 and weights:
            raise ValueError(
                f"the latent is on {', '.join(sorted(latents))} and {type(self._model).__name__} on "
                f"{', '.join(sorted(weights))}; move them to one device."
            )

    def _refuse_training(self) -> None:
        if any(module.training for module in self._model.modules()):
            raise ValueError(f"{type(self._model).__name__} is in training mode; call model.eval() before sampling.")


def _refuse_unknown(call: Call) -> None:
    """Raise `Unservable` if the call holds an object that may be another one though it is the same."""
    if (unknown := call.unknown()) is not None:
        name, held = unknown
        raise Unservable(
            f"{name} holds a {type(held).__name__}; what such an object does to the output cannot be followed. Pass "
            f"tensors, numbers, strings, containers and objects of them."
        )


def _rank_conditioning(options: SamplerOptions, call: Call, roles: Roles) -> RankConditioning | None:
    """The fit that `options` ask for, at the timesteps of `call`; None with a table."""
    covers = options.fitted_range
    if covers is None or not isinstance(options.conditioning, Rank):
        return None
    clocks = [t for t, owner in zip(call.tensors, call.owners, strict=True) if roles.by_argument[owner] == "step"]
    if len(clocks) > 1:
        raise ValueError(
            f"conditioning=Rank(…) follows one clock, and {', '.join(roles.named('step'))} are timesteps; pass roles= "
            f"with 'live' for the others, or conditioning=Exact()."
        )
    (t,) = clocks
    return RankConditioning(options.conditioning.rank, covers, t)
