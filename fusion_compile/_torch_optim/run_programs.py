"""One program for all runs of a bank, called for one after another with the run's parts of the group's banks.

A call through Dynamo's guards costs more than most runs need. The first run of a step goes through them, so that what a
program assumed is still looked at once a step; the others call what was compiled, whose inputs are alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._program.beside_its_graph import Beside
from fusion_compile._program.lower import resolve_mode
from fusion_compile._program.programs import Programs
from fusion_compile._state import keys
from fusion_compile._state.banks import Bank, Layout
from fusion_compile._step.update import donated
from fusion_compile._torch_optim._compat import clear_each, copy_each
from fusion_compile._torch_optim.one_form import NEXT, Form, form_of, is_shared, update_of_one
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._torch_optim.piecewise import COLUMNS
from fusion_compile._torch_optim.runs import Run, Runs, where_it_lies
from fusion_compile._torch_optim.update_program import UpdatePrograms, outside_autocast
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import Transform

_ROWS = 1 << 12
"""Of the tensors on which a program is compiled: enough for a compiler to use all threads."""


class _Compiled(NamedTuple):
    """What was compiled, and which of its inputs is what: a key of a run's state, or one of the three below.

    `gradient`, `loss`: which input that is.
    """

    call: Callable[..., Any]
    inputs: tuple[str, ...]
    gradient: int
    loss: int | None


_GRADIENT, _LOSS, _SIZE = " gradient", " loss", " size"


class _Group:
    """The runs of one group with their states, for the last set of parameters without a gradient. `guarded`: which run
    goes through the guards."""

    def __init__(self, group: ParameterGroup) -> None:
        self.group, self.runs = group, Runs(group.layout)
        self.shared = {k: t for k, t in group.state.items() if is_shared(group.layout, k, t)}
        self.next = {f"{NEXT}{k}": t.clone() for k, t in self.shared.items()}
        self.missing: frozenset[str] | None = None
        self.cut: list[tuple[Run, Form, Tensors]] = []
        self.arguments: dict[int, list[Any]] = {}
        self.guarded = -1

    def state_of(self, bank: Bank, first: int, last: int) -> Tensors:
        """A part's state as the group has it."""
        layout, state = self.group.layout, {keys.HYPERPARAMETERS: self.group.state[keys.HYPERPARAMETERS]}
        for key, tensor in self.group.state.items():
            if key in self.shared:
                state[key] = tensor
            elif key != keys.HYPERPARAMETERS and layout.bank_of(key) == bank.key:
                state[key] = tensor[first:last].view(-1, COLUMNS)
        return state


class RunPrograms:
    """The programs of one optimizer, beside `whole`, those of its banks."""

    def __init__(self, whole: UpdatePrograms) -> None:
        self._whole = whole
        self._programs = Programs(whole.backend)
        self._forms: dict[Hashable, Form] = {}
        self._compiled: dict[Hashable, _Compiled | None] = {}
        self._groups: dict[int, _Group] = {}

    def __len__(self) -> int:
        return len(self._programs)

    def forget(self) -> None:
        """Drop all programs: a group was built again, and its banks are other tensors."""
        self.__init__(self._whole)  # type: ignore[misc]

    def memory(self, at: int) -> tuple[Tensor, ...]:
        """Where the small gradients of group `at` lie during an update."""
        return self._groups[at].runs.memory if at in self._groups else ()

    def step(
        self,
        group: ParameterGroup,
        transform: Transform,
        half_precision: str,
        given: Tensors,
        *,
        uphill: bool,
        loss: Tensor | None,
    ) -> None:
        """Take one update of the parameters of `group` that `given` has gradients of.

        `transform`: of the optimizer, before it knows banks. `uphill`: with the other sign. `loss`: 0-dim.
        """
        own = self._groups.get(group.at)
        if own is None or own.group is not group:
            own = self._groups[group.at] = _Group(group)
        missing = frozenset(group.members) - given.keys() if len(given) < len(group.members) else frozenset()
        if own.missing != missing:
            self._cut(own, missing, transform, half_precision)
        with outside_autocast(group.layout.device):
            for i in range(len(own.cut)):
                self._update(own, i, given, uphill, loss)
            for key, tensor in own.shared.items():
                tensor.copy_(own.next[f"{NEXT}{key}"])

    def _cut(self, own: _Group, missing: frozenset[str], transform: Transform, half_precision: str) -> None:
        own.missing, own.cut, own.arguments, own.guarded = missing, [], {}, -1
        for run in own.runs.of(missing):
            state, kind = own.state_of(run.bank, run.first, run.last), run.bank.key
            if kind not in self._forms:
                place = run.bank.places[0]._replace(name="x", shape=(run.last - run.first,), at=0, order=())
                bank = dataclasses.replace(run.bank, places=(place,), length=place.numel)
                layout = Layout((bank,), own.group.layout.device)
                self._forms[kind] = form_of(kind, transform, half_precision, own.group, layout, state)
            form = self._forms[kind]
            if own.guarded < 0 and run.rows > 1:  # a size of 1 is another program to Dynamo
                own.guarded = len(own.cut)
            own.cut.append((run, form, form.own(state, own.next)))

    def _update(self, own: _Group, i: int, given: Tensors, uphill: bool, loss: Tensor | None) -> None:
        """Update run `i`."""
        run, form, state = own.cut[i]
        gradient = _gradient(run, given, uphill)
        key, further = (form.key, loss is not None), () if loss is None else (loss,)
        if key not in self._programs:
            self._compile(key, form, own.group.layout.device, state, loss)
        compiled = self._compiled[key]
        if compiled is None or i == own.guarded:
            self._programs.rerun(key, state, {run.bank.key: gradient}, *further)
            return
        arguments = own.arguments.get(i)
        if arguments is None:
            arguments = [run.rows if name == _SIZE else state.get(name) for name in compiled.inputs]
            own.arguments[i] = arguments
        arguments[compiled.gradient] = gradient
        if compiled.loss is not None:
            arguments[compiled.loss] = loss
        compiled.call(*arguments)
        arguments[compiled.gradient] = None  # it is the caller's, who may free it

    def _compile(self, key: Hashable, form: Form, device: torch.device, state: Tensors, loss: Tensor | None) -> None:
        """Compile on tensors that are thrown away, of a usual size, so that any run's may follow."""
        (bank,) = form.plan.layout.banks
        update = donated(update_of_one(form.plan, False))
        mode = resolve_mode(self._whole.mode, device, self._whole.backend)
        if mode == "eager":
            self._programs.keep(key, update)
            self._compiled[key] = None
            return
        some = {k: t.new_zeros((_ROWS, COLUMNS)) if t.ndim > 1 else t.clone() for k, t in state.items()}
        gradient = torch.zeros((_ROWS, COLUMNS), dtype=bank.dtype, device=device)
        _compat.mark_symbolic((t, 0) for t in (gradient, *some.values()) if t.ndim > 1)
        self._programs.compile(
            key, update, some, {bank.key: gradient}, *(() if loss is None else (loss,)),
            mode=mode, what="the optimizer's update", beside=Beside(lambda graph, run: None), dynamic=True,
        )  # fmt: skip
        call = self._programs.unguarded(key)
        inputs = tuple(map(_which, self._programs.captured[key].graph.graph.find_nodes(op="placeholder")))
        known = {*state, _GRADIENT, _LOSS, _SIZE}
        at = {name: i for i, name in enumerate(inputs)}
        self._compiled[key] = None
        if call is not None and known >= {*inputs} and _GRADIENT in at:
            self._compiled[key] = _Compiled(call, inputs, at[_GRADIENT], at.get(_LOSS))
        self._programs.forget_graph(key)


def _gradient(run: Run, given: Tensors, uphill: bool) -> Tensor:
    """The gradients of a run's parameters as ``[rows, 16]``."""
    if run.gradient is None:
        (place,) = run.members
        lies = where_it_lies(given[place.name], place)
        return -lies if uphill else lies
    copy_each(run.places, [*map(given.__getitem__, run.names)])
    if run.padding:
        clear_each(run.padding)
    return run.gradient.neg_() if uphill else run.gradient


def _which(node: torch.fx.Node) -> str:
    """What an input of a captured update is."""
    said = _compat.input_source(node)
    if ".size()" in said or ".shape" in said:
        return _SIZE
    if said.startswith("L['state']['") and said.endswith("']"):
        return said.removeprefix("L['state']['").removesuffix("']")
    return _GRADIENT if said.startswith("L['batch'][0]['") else _LOSS if said == "L['batch'][1]" else f"? {said}"
