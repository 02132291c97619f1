"""A parameter group some of whose parameters are DTensors: `ParameterGroup` on stand-ins.

Gradients travel to stand-ins before an update and weights back after it; the update itself is the one of whole
parameters. All ranks step, show, load and save together.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._state import keys
from fusion_compile._state.mismatches import difference
from fusion_compile._state.named_state import kept_parts
from fusion_compile._state.routing import Route
from fusion_compile._step.separable import is_entry_by_entry
from fusion_compile._torch_optim._compat import norm_of_each
from fusion_compile._torch_optim.parameter_group import ParameterGroup, Parts, is_a_part, is_of_an_average
from fusion_compile._torch_optim.stand_ins import StandIns, is_held
from fusion_compile._torch_optim.stored_parts import StoredParts
from fusion_compile._types import Tensors
from fusion_compile.optim._schedules import Schedule
from fusion_compile.optim._transform import Transform

_HEAD = 32
"""Entries of each part that are compared besides its norm."""


class ShardedGroup(ParameterGroup):
    """`covers`: all parameters of the group. ``members`` are what this rank updates, under the same names.

    `written_anywhere`: whether some rank says that its parts were written since the last update.
    """

    def __init__(
        self,
        at: int,
        covers: Mapping[str, nn.Parameter],
        routes: tuple[Route, ...],
        transform: Transform,
        numbers: Mapping[str, float | Schedule],
        half_precision: str = "master",
    ) -> None:
        self.stand_ins = StandIns(covers, {r.name: r for r in routes}, is_entry_by_entry(transform))
        members = self.stand_ins.parameters
        own = tuple(self.stand_ins.route(r) for r in routes if r.name in members)
        super().__init__(at, members, own, transform, numbers, half_precision)
        self.covers, self.routes = dict(covers), routes
        self.written_anywhere = False
        shared = {part for part, bank, _ in kept_parts(self.layout, self.state) if bank is None}
        self._stored = StoredParts(self.stand_ins, self.parts(), shared)
        self._note_parts()

    def _is_piecewise(self, transform: Transform, half_precision: str) -> bool:
        return False  # gradients come from other ranks, into their places

    # ------------------------------------------------------------------ the parameters

    def _note_parts(self) -> None:
        parts = self.stand_ins.parts()
        self._seen = self._versions_of(parts), self._look(parts)

    def _versions_of(self, parts: Tensors) -> list[tuple[int, int]]:
        return [(t._version, self.covers[n]._version) for n, t in parts.items()]

    @staticmethod
    def _look(parts: Tensors) -> Tensor:
        """Numbers by which a write is known that leaves no other trace (through ``.data``)."""
        filled = [t for t in parts.values() if t.numel()]
        if not filled:
            return torch.empty(0)
        norms = torch.stack([n.double() for n in norm_of_each(filled)])
        return torch.cat([norms, *(t.reshape(-1)[:_HEAD].double() for t in filled)])

    def is_written(self) -> bool:
        """Whether somebody wrote this rank's parts since they were last given back."""
        parts = self.stand_ins.parts()
        return self._versions_of(parts) != self._seen[0] or not torch.equal(self._look(parts), self._seen[1])

    def take_back(self) -> str | None:
        """Bring what was written to the parameters of any rank into the stand-ins. Return a name as the plain group
        does."""
        name = super().take_back()
        if self.written_anywhere:
            with torch.no_grad():
                changed = self.stand_ins.take()
            self.written_anywhere = False
            self._note_parts()
            name = name or (changed[0] if changed and self.moves else None)
        return name

    def publish(self) -> None:
        """Give the stand-ins' weights back to the parameters of all ranks."""
        with torch.no_grad():
            self.stand_ins.give_back()
        self._note_parts()

    def show(self, evaluating: bool) -> None:
        super().show(evaluating)
        self.publish()

    def show_where_average(self) -> None:
        self.written_anywhere = True
        self.take_back()
        super().show_where_average()
        self.publish()

    def holders(self, names: Sequence[str]) -> list[nn.Parameter]:
        return [self.covers[n] for n in names if n not in self.stand_ins.held]

    # ------------------------------------------------------------------ what a step is given

    def gather(self, gradients: Tensors, *, uphill: bool = False) -> Tensors:
        parts = {n: self.stand_ins.gradient(n, g) for n, g in gradients.items()}
        whole = {n for n, h in self.stand_ins.held.items() if h.has_whole}

        def fill(places: Tensors) -> Collection[str]:
            self.stand_ins.send(parts, {n: places[n] for n in whole})
            return whole

        own = {n: g for n, g in parts.items() if n in self.members and n not in whole}
        banks = self._gradients.gather(self.members, own, uphill=uphill, fill=fill)
        return keys.of_group(self.at, banks)

    # ------------------------------------------------------------------ state by parameter

    def kept_in(self, state: Mapping[Any, Any], first: int | None = None) -> frozenset[str]:
        marks = itertools.islice(((n, next(iter(form), None)) for n, form in self._stored.form.items()), first)
        return frozenset(n for n, part in marks if part is None or part in state.get(self.covers[n], ()))

    def shown(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The state by parameter, on every rank under the same names; what others own is empty here."""
        own = self.parts()
        nothing = {
            n: {p: torch.empty(0, dtype=k.dtype) for p, k in form.items()} for n, form in self._stored.form.items()
        }
        return {p: {**nothing[n], **own.get(n, {})} for n, p in self.covers.items()}

    def stored(self) -> dict[str, dict[str, Tensor]]:
        """The state by parameter as it is saved; all ranks call this at the same time."""
        with torch.no_grad():
            return self._stored.stored(self.parts())

    def saved_in(self, state: Mapping[Any, Any], former: ParameterGroup | None) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = former.stored() if isinstance(former, ShardedGroup) else {}
        waiting = {n: dict(state[p]) for n, p in self.covers.items() if n not in found and state.get(p)}
        return {**found, **waiting}

    def load_saved(self, saved: Mapping[str, Parts]) -> None:
        self.load(self._stored.held({n: saved[n] for n in self.covers if n in saved}))

    def problems(self, saved: Mapping[str, Parts], *, complete: bool = True) -> list[str]:
        lines = super().problems({n: saved[n] for n in saved if n not in self.stand_ins.held}, complete=complete)
        for name, form in self._stored.form.items():
            if name not in saved or name not in self.stand_ins.held:
                continue
            given = {p: v for p, v in saved[name].items() if p in form or is_a_part(p)}
            if complete:
                lines += [f"missing {p} of {name}" for p in form if p not in given]
                lines += [f"unexpected {p} of {name}" for p in given if p not in form and not is_of_an_average(p)]
            for part, kept in form.items():
                what = _difference(kept.shape, kept.dtype, given[part]) if part in given else ""
                lines += [f"mismatched {part} of {name}: {what}"] if what else []
        return lines

    def holds(self, name: str) -> bool:
        """Whether this rank updates a parameter, or its part of it."""
        return name in self.members and is_held(self.stand_ins.held.get(name))


def _difference(shape: tuple[int, ...], dtype: torch.dtype, given: Any) -> str:
    wanted = torch.zeros((), dtype=dtype).expand(shape)
    if _compat.is_spread_over_devices(given):
        if tuple(given.shape) == shape:
            part = given.to_local()
            return difference(torch.zeros((), dtype=dtype, device=part.device).expand(part.shape), part)
        given = torch.zeros((), dtype=given.dtype).expand(given.shape)
    return difference(wanted, given)
