"""The programs of one model, one for each combination of shapes, and the structure they were made from."""

from __future__ import annotations

import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fusion_compile._capture.structure_watch import StructureWatch
from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import Call, CallKey, take_apart, what_varies
from fusion_compile._sampler.graph.roles import Roles, assign_roles, roles_of_names
from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.weights.release import ReleasableWeights
from fusion_compile._say_once import SayOnce

MAX_PROGRAMS = 4
"""Shapes that one sampler serves at a time; beyond it the one not used for longest is dropped."""

REQUEST_SLOTS = 2
"""Requests whose rows are kept: a condition and its null, called by turns."""


class SamplerPrograms:
    """Programs by call, the one used last at the end; `len()` of them are kept.

    `build`: the arguments of `SamplerProgram` after the roles. Raises ValueError for roles of arguments that the model
    does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        signature: inspect.Signature,
        roles: Mapping[str, str] | None,
        weights: ReleasableWeights,
        say_once: SayOnce,
        build: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._model, self._signature, self._given_roles = model, signature, roles
        self._weights, self._say_once, self._build_options = weights, say_once, build
        self._roles: Roles | None = None
        self._programs: OrderedDict[CallKey, SamplerProgram] = OrderedDict()
        self._graphs = GraphsByShape(model, signature, say_once)
        self._structure: StructureWatch | None = None
        open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        if not open_ended and (unknown := sorted(set(roles or ()) - set(signature.parameters))):
            raise ValueError(
                f"roles name {unknown}, which {type(model).__name__}.forward does not take; its arguments are "
                f"{list(signature.parameters)}."
            )

    def __len__(self) -> int:
        return len(self._programs)

    def values(self) -> tuple[SamplerProgram, ...]:
        """The programs, the one used last at the end."""
        return tuple(self._programs.values())

    @property
    def roles(self) -> Mapping[str, str]:
        """Argument -> role: as they were assigned for the first call, or what names alone tell."""
        if self._roles is not None:
            return self._roles.by_argument
        return roles_of_names(list(self._signature.parameters), self._given_roles)

    def of(self, call: Call) -> SamplerProgram:
        """The program of the call's shapes, made if need be.

        Raises ValueError for a model in training mode or on another device than the call, RuntimeError if a program
        must be made while weights are out of memory.
        """
        self._follow_structure()
        program = self._programs.get(call.key)
        if program is None:
            program = self._build(call)
            self._programs[call.key] = program
            self._structure = StructureWatch(self._model)  # with what tracing wrote to the model
            if len(self._programs) > MAX_PROGRAMS:
                self._say_once(
                    "programs",
                    f"the sampler was called with more than {MAX_PROGRAMS} combinations of shapes, dtypes and "
                    f"constants ({what_varies(self._programs)}); each is compiled by itself, and the one not used for "
                    f"longest is dropped. Pad to fewer shapes.",
                )
                self._programs.popitem(last=False)
        self._programs.move_to_end(call.key)
        return program

    def completed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """A call with these arguments; where those of the loop are left out, as in the last call. None if unknown."""
        given = dict(self._signature.bind_partial(*args, **kwargs).arguments)
        if given and any(role in ("live", "step") and name not in given for name, role in self.roles.items()):
            if not self._programs:
                return None
            given = self.values()[-1].complete(given)
        if not given:
            return None
        for parameter in self._signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        return take_apart(self._signature, (), given)

    def model_wrote_to_itself(self) -> None:
        """The model was called: what is different now is its own doing."""
        if self._structure is not None:
            self._structure.remember()

    def _follow_structure(self) -> None:
        """Read replaced parameters; forget all programs if the model is another than was traced."""
        if self._structure is None or (change := self._structure.changed()) is None:
            return
        self._refuse_training()
        tensors = change.tensors
        if tensors is not None and all(program.rebind(tensors) for program in self.values()):
            self._weights.were_replaced(tensors)
            self._structure.remember()
            return
        self._weights.refuse_if_out(f"{change.what}; building the sampler again")
        self._say_once("structure", f"{change.what}; the sampler is built again.")
        self._programs.clear()
        self._graphs.forget()
        self._structure = None

    def _build(self, call: Call) -> SamplerProgram:
        self._refuse_training()
        roles = assign_roles(call.arguments, self._given_roles)
        if roles.guessed and self._roles is None and sys.stderr.isatty():
            print(f"fusion_compile: roles {roles}; pass roles= to say otherwise", file=sys.stderr)
        self._roles = roles
        name = type(self._model).__name__
        devices = {
            str(t.device) for t, o in zip(call.tensors, call.owners, strict=True) if roles.by_argument[o] == "live"
        }
        weights = {str(p.device) for p in self._model.parameters()}
        if len(devices | weights) > 1 and weights:
            raise ValueError(
                f"the latent is on {', '.join(sorted(devices))} and {name} on {', '.join(sorted(weights))}; move them "
                f"to one device."
            )
        self._weights.refuse_if_dropped(
            self._weights.names, "the table of a new shape", "prepare every shape before weights are dropped"
        )
        with self._weights.resident():
            program = SamplerProgram(
                self._model, self._graphs.of, call, roles, n_slots=REQUEST_SLOTS, **self._build_options()
            )
        self._weights.refuse_if_out_among(program.body_names, "the loop at this shape")
        if program.not_captured is not None:
            self._say_once(
                "replay",
                f"the loop of {name} runs kernel by kernel, not as a CUDA graph: {program.not_captured.rstrip('.')}. "
                f"Pass mode='max-autotune-no-cudagraphs' to say that this is meant.",
            )
        return program

    def _refuse_training(self) -> None:
        if any(module.training for module in self._model.modules()):
            raise ValueError(f"{type(self._model).__name__} is in training mode; call model.eval() before sampling.")
