"""Updates inside backward(): each parameter as soon as its gradient is there, and the gradient freed at once.

A parameter is updated in its own part of the group's banks, by a program for its shape: what distinguishes two
parameters of one shape (their memory, their names) comes to it as tensors. Numbers that all parameters of a group share
(powers of β, counts) have the value of before the step for each of them; the new value waits in a place beside, until
`close` ends the step. So banks, checkpoints and numbers are those of an ordinary step.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from fusion_compile._program.lower import resolve_mode, without_cuda_graph
from fusion_compile._program.programs import Programs
from fusion_compile._state import keys
from fusion_compile._state.banks import Bank, Layout
from fusion_compile._step.pooled import refuse_pooled
from fusion_compile._step.update import donated
from fusion_compile._torch_optim._compat import is_scaling_losses
from fusion_compile._torch_optim.group_record import gradients_of, names_in
from fusion_compile._torch_optim.grouped_update import GroupedUpdate
from fusion_compile._torch_optim.named_groups import STEPS
from fusion_compile._torch_optim.one_form import NEXT, Form, form_of, is_shared, update_of_one
from fusion_compile._torch_optim.parameter_group import ParameterGroup
from fusion_compile._torch_optim.torch_words import MAXIMIZE, gradient_belongs
from fusion_compile._torch_optim.update_program import outside_autocast
from fusion_compile._types import Tensors
from fusion_compile.optim._rounding_noise import number_of


class _Unit(NamedTuple):
    """One parameter: its form, its parts of the group's banks, and the numbers of its names."""

    form: Form
    state: Tensors
    names: Tensor


class _Units(NamedTuple):
    """Those of one group, by name, the next values of the numbers that they share, and which of these have come."""

    group: ParameterGroup
    units: dict[str, _Unit]
    next: Tensors
    moved: set[str]


class ReleasedGradients:
    """Hooks on the parameters of an optimizer. `close` ends a step; the next gradient begins another."""

    def __init__(self, optimizer: torch.optim.Optimizer, inside: GroupedUpdate) -> None:
        if inside.averages:
            raise ValueError(
                "release_gradients=True with ema=: an average follows every weight once a step, those without a "
                "gradient too, so it is not done when the last gradient comes. Keep the EMA outside of the optimizer "
                "(torch.optim.swa_utils.AveragedModel), or leave release_gradients out."
            )
        refuse_pooled(inside.transform)
        self._optimizer, self._inside = weakref.ref(optimizer), inside
        self._programs = Programs(inside.programs.backend)
        self._forms: dict[Hashable, Form] = {}
        self._units: dict[int, _Units] = {}
        self._arrived: dict[int, set[str]] = {}
        self._names: dict[int, tuple[int, str]] = {}
        self._handles: list[Any] = []
        self._watched: set[int] = set()
        weakref.finalize(optimizer, _take_off, self._handles)
        self.watch()

    def __len__(self) -> int:
        """How many programs there are."""
        return len(self._programs)

    def watch(self) -> None:
        """Hang a hook on every parameter that can have a gradient and has none."""
        groups = self._groups()
        named = ((at, n, p) for at, record in enumerate(self._inside.records) for n, p in _named(record, groups[at]))
        weakly = weakref.ref(self)
        for at, name, p in named:
            self._names[id(p)] = at, name
            if p.requires_grad and id(p) not in self._watched:
                self._watched.add(id(p))
                untyped: Any = p  # torch gives this one no types
                self._handles.append(untyped.register_post_accumulate_grad_hook(_Hook(weakly)))

    def arrive(self, p: Tensor, *, late: bool = False) -> None:
        """Update `p`, whose gradient is complete, and free the gradient.

        That of a parameter that joins a group which has banks already waits until the step ends (`late`): banks that
        are built anew would change weights under the backward.

        Raises RuntimeError where the step cannot be taken; what was updated before stays updated.
        """
        at, name = self._names[id(p)]
        options = self._groups()[at]
        if self._inside.moves and self._inside.evaluating:
            said = gradient_belongs(self._inside.transform)
            raise RuntimeError(f"a gradient came while the optimizer is in eval mode: {said}")
        if name in self._arrived.get(at, ()):
            raise RuntimeError(
                f"release_gradients=True: a second gradient of {name} {list(p.shape)} came before optimizer.step(), "
                f"and the first has been applied. Each backward() is a step, so gradients cannot be accumulated, nor "
                f"may a parameter lie in two reentrant checkpoints. Call optimizer.step() after each backward(), "
                f"checkpoint with use_reentrant=False, or leave release_gradients out."
            )
        known = self._inside.records[at].group
        if not late and known is not None and name not in known.members:
            return
        with torch.no_grad():
            group = self._begin(at, name, p, options)
            given, p.grad = p.grad, None
            assert given is not None
            self._update(group, name, given.detach(), options)
        torch.autograd.graph.increment_version([p])
        group.note_version(name)
        self._arrived[at].add(name)

    def close(self) -> None:
        """End the step: shared numbers and counts move on, and periodic work runs. Gradients that somebody put into
        ``.grad`` by hand are applied first. Without any gradient nothing happens."""
        self.watch()
        for p in names_in(self._inside.records, self._groups()).values():
            if p.grad is not None:
                self.arrive(p, late=True)
        open_now, self._arrived = self._arrived, {}
        for at in open_now:
            (group, _, after, moved), options = self._units[at], self._groups()[at]
            with torch.no_grad():
                for key in moved:
                    group.state[key.removeprefix(NEXT)].copy_(after[key])
            moved.clear()
            options[STEPS] += 1
            self._inside.programs.after_step(group, options[STEPS])
            if group.moves:
                group.written_point.note()
        if open_now:
            self._inside.guards.switch(self._inside.moves)

    # ------------------------------------------------------------------ one parameter

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer.param_groups

    def _begin(self, at: int, name: str, p: Tensor, options: dict[str, Any]) -> ParameterGroup:
        """The group `at` with `name` in place, made ready at the first gradient of a step."""
        optimizer, group = self._optimizer(), self._inside.records[at].group
        assert optimizer is not None
        given = gradients_of([(name, p)])
        if at not in self._arrived:
            if not self._arrived:
                _refuse_surroundings(first=group is None)
            group = self._inside.ready(at, options, optimizer.state, given, self._inside.has_lost(optimizer.state))
            self._inside.apply_numbers(group, options)
            self._arrived[at] = set()
        elif group is None or name not in group.members:
            group = self._inside.ready(at, options, optimizer.state, given, False)
        return group

    def _update(self, group: ParameterGroup, name: str, gradient: Tensor, options: dict[str, Any]) -> None:
        unit = self._unit(group, name)
        form, layout = unit.form, unit.form.plan.layout
        form.names.copy_(unit.names)
        due = group.transform.period > 0 and options[STEPS] % group.transform.period == 0
        (bank,) = layout.banks
        arranged = {bank.key: _arranged(bank, -gradient if options.get(MAXIMIZE) else gradient)}
        self._units[group.at].moved.update(key for key in unit.state if key.startswith(NEXT))
        with outside_autocast(layout.device):
            if self._programs.rerun((form.key, due), unit.state, arranged):
                return
            mode = without_cuda_graph(resolve_mode(self._inside.programs.mode, layout.device))
            update, what = donated(update_of_one(form.plan, due)), f"the update of a {list(bank.places[0].shape)}"
            self._programs.compile((form.key, due), update, unit.state, arranged, mode=mode, what=what)

    def _unit(self, group: ParameterGroup, name: str) -> _Unit:
        known = self._units.get(group.at)
        if known is None or known.group is not group:
            shared = {k: t for k, t in group.state.items() if is_shared(group.layout, k, t)}
            after = {f"{NEXT}{key}": t.clone() for key, t in shared.items()}
            if known is not None:  # the group was built anew, perhaps in the middle of a step
                after |= {key: t for key, t in known.next.items() if key in known.moved}
            known = self._units[group.at] = _Units(group, {}, after, set() if known is None else known.moved)
        if name not in known.units:
            known.units[name] = self._new_unit(group, name, known.next)
        return known.units[name]

    def _new_unit(self, group: ParameterGroup, name: str, after: Tensors) -> _Unit:
        whole = next(b for b in group.layout.banks if any(p.name == name for p in b.places))
        bank, first, last = _alone(whole, name)
        layout = Layout((bank,), group.layout.device)
        if layout.state_dtype != group.layout.state_dtype:
            raise ValueError(
                f"release_gradients=True: {name} is {bank.dtype} and other parameters of its group are updated in "
                f"{group.layout.state_dtype}; give those of one dtype a group of their own."
            )
        state: Tensors = {}
        for key, tensor in group.state.items():
            if key == keys.HYPERPARAMETERS or is_shared(group.layout, key, tensor):
                state[key] = tensor
            elif group.layout.bank_of(key) == whole.key:
                each = whole.length // max(1, tensor.shape[0])  # of a flat bank, one number for so many entries
                state[key] = tensor[first // each : last // each]
        own = bank.places[0]
        kind = (bank.key, own.shape, own.order, bank.shape)
        if kind not in self._forms:
            inside = self._inside
            self._forms[kind] = form_of(kind, inside.transform, inside.half_precision, group, layout, state)
        form = self._forms[kind]
        state = form.own(state, after)
        numbers = [number_of(n) for n in _names_of(own.name, form.names.shape[0])]
        return _Unit(form, state, torch.tensor(numbers, dtype=torch.int64, device=layout.device))


class _Hook:
    """What hangs on a parameter. It knows its owner weakly, and a copy of the parameter has none."""

    def __init__(self, owner: weakref.ref[ReleasedGradients]) -> None:
        self._owner = owner

    def __call__(self, p: Tensor) -> None:
        if (owner := self._owner()) is not None:
            owner.arrive(p)


def _take_off(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _named(record: Any, options: Mapping[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(record.names, options["params"], strict=True))


def _alone(bank: Bank, name: str) -> tuple[Bank, int, int]:
    """A bank of the parameter `name` alone, and where it begins and ends in `bank`."""
    i = next(i for i, place in enumerate(bank.places) if place.name == name)
    place = bank.places[i]
    if bank.matrix is not None:
        last = place.at + bank.matrices[i]
    else:
        last = bank.places[i + 1].at if i + 1 < len(bank.places) else bank.length
    alone = dataclasses.replace(bank, places=(place._replace(at=0),), length=last - place.at)
    return alone, place.at, last


def _names_of(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]


def _arranged(bank: Bank, gradient: Tensor) -> Tensor:
    """A gradient in the form of its bank, without a copy where it lies as the bank does."""
    (place,) = bank.places
    ordered = gradient.permute(place.order) if place.order else gradient
    if ordered.is_contiguous() and ordered.numel() == math.prod(bank.shape):
        return ordered.view(bank.shape)
    return bank.join([gradient], bank.dtype)


def _refuse_surroundings(*, first: bool) -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "release_gradients=True with several processes: the update would be taken before the gradients of all "
            "processes are averaged. Leave release_gradients out."
        )
    if first and is_scaling_losses():
        refuse_scaler()


def refuse_scaler() -> NoReturn:
    """Raise RuntimeError: a loss is scaled."""
    raise RuntimeError(
        "release_gradients=True with a GradScaler: the gradients that arrive are scaled, and whether they are finite "
        "is known only after the whole backward. Train in bfloat16 without a scaler, or leave release_gradients out."
    )
