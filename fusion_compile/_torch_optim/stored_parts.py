"""The state of parameters that lie on several ranks, as everybody stores it: DTensors beside their parameters.

Owners hold whole matrices, which parts of the torch checkpoint code would take for asymmetric state. So what is saved
lies as the parameters do, whoever owned what: any world size loads it, and so does an optimizer on one process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._ranks.shards.exchange import Exchange, Item
from fusion_compile._ranks.shards.holdings import Holding
from fusion_compile._ranks.shards.spread import Spread, as_placed
from fusion_compile._torch_optim.stand_ins import StandIns, is_held

ByPart = Mapping[str, Mapping[str, Any]]
"""By parameter and part."""


class Kept(NamedTuple):
    """One part of a parameter's state, the whole of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class StoredParts:
    """Between what ranks hold of the state of `stand_ins` and what is stored. All ranks make it at the same time.

    `parts`: this rank's state by stand-in and part. `shared`: names of the parts that are one number of all parameters.
    `form`: of all parameters, what is kept.
    """

    def __init__(self, stand_ins: StandIns, parts: ByPart, shared: Collection[str]) -> None:
        self._inside = stand_ins
        own = {n: self._form_of(n, kept) for n, kept in parts.items() if is_held(stand_ins.held.get(n))}
        numbers = {p: Kept((), t.dtype) for kept in parts.values() for p, t in kept.items() if p in shared}
        for exchange in stand_ins.exchanges:
            for theirs, their_numbers in exchange.all_say((own, numbers)):
                own |= {n: form for n, form in theirs.items() if n in stand_ins.covers}
                numbers = {**their_numbers, **numbers}
        self._shared = frozenset(numbers)
        self.form: dict[str, dict[str, Kept]] = {n: {**own.get(n, {}), **numbers} for n in stand_ins.covers}

    def _form_of(self, name: str, parts: Mapping[str, Tensor]) -> dict[str, Kept]:
        return {part: Kept(self._whole_shape(name, part, t), t.dtype) for part, t in parts.items()}

    def _whole_shape(self, name: str, part: str, t: Tensor) -> tuple[int, ...]:
        """The shape of a part of the state for the whole parameter. `t`: what this rank holds of it."""
        holding = self._inside.held.get(name)
        if holding is None or not holding.has_part or not holding.spread.cut or not t.ndim:
            return tuple(t.shape)
        mine, shape = holding.spread.mine.shape, holding.spread.shape
        if tuple(t.shape) == mine:
            return shape
        if len(shape) == 3 and mine[0] == 1 and t.shape[:1] != (1,):  # of a stack of one matrix
            return (shape[0], *t.shape)
        if len(shape) == 3 and t.shape[0] == mine[0]:
            return (shape[0], *t.shape[1:])
        raise ValueError(
            f"{part} of {name} {list(shape)} is {list(t.shape)} for a part {list(mine)} of it, and nothing tells how "
            f"the parts make up a whole. Place {name} whole on every rank, or take another recipe."
        )

    # ------------------------------------------------------------------ to be stored

    def stored(self, parts: ByPart) -> dict[str, dict[str, Tensor]]:
        """All state as DTensors and as numbers that are the same on all ranks, which call this at the same time."""
        found: dict[str, dict[str, Tensor]] = {n: {} for n in self._inside.covers}
        numbers = {p: t for own in parts.values() for p, t in own.items() if p in self._shared}
        for (
            exchange
        ) in self._inside.exchanges:  # the first rank's count: one without parameters of a role lacks its numbers
            for theirs in reversed(exchange.all_say({p: t.cpu() for p, t in numbers.items()})):
                numbers |= {p: t.to(self._inside.device) for p, t in theirs.items()}
        for name, form in self.form.items():
            holding, own = self._inside.held.get(name), parts.get(name, {})
            if holding is None:
                found[name] = dict(own)
            elif holding.owner is None:
                mine = own if holding.has_part else {}
                parts_of = {p: k for p, k in form.items() if p not in self._shared}
                found[name] = {p: self._as_stored(holding, k, mine.get(p)) for p, k in parts_of.items()}
            found[name] |= numbers
        for exchange in self._inside.exchanges:
            self._collect(exchange, parts, found)
        return found

    def _as_stored(self, holding: Holding, kept: Kept, own: Tensor | None) -> Tensor:
        """One part of a parameter of which each rank has its own. `own`: what this rank holds of it, if anything."""
        spread = holding.spread.like(kept.shape)
        part = torch.empty(spread.mine.shape, dtype=kept.dtype, device=self._inside.device) if own is None else own
        return spread.tensor(part.view(spread.mine.shape) if part.shape != spread.mine.shape else part)

    def _collect(self, exchange: Exchange, parts: ByPart, found: dict[str, dict[str, Tensor]]) -> None:
        """Send what owners hold whole to the ranks on which it is stored."""
        items, whole, into, places = self._items(exchange), {}, {}, {}
        for item, name, part, spread in items:
            if item.owner == exchange.me:
                whole[item.name] = parts[name][part]
            place = torch.empty(spread.mine.shape, dtype=item.dtype, device=self._inside.device)
            into[item.name], places[name, part] = place, (place, spread)
        every = Exchange(tuple(i for i, *_ in items), exchange.group, exchange.me, exchange.ranks)
        every.to_parts(whole, lambda item: into[item.name], self._inside.device)
        for (name, part), (place, spread) in places.items():
            found[name][part] = spread.tensor(place) if place.ndim else place

    def _items(self, exchange: Exchange) -> list[tuple[Item, str, str, Spread]]:
        """Every part of the state that has an owner, in the same order on all ranks."""
        found = []
        for item in exchange.items:
            holding = self._inside.held[item.name]
            for part, kept in self.form[item.name].items() if item.owner is not None else ():
                if part in self._shared:
                    continue
                spread = holding.spread.like(kept.shape)
                one = Item(f"{item.name}\n{part}", kept.dtype, spread.boxes, item.owner, item.also)
                found.append((one, item.name, part, spread))
        return found

    # ------------------------------------------------------------------ to be held

    def held(self, saved: ByPart) -> dict[str, dict[str, Any]]:
        """What this rank holds of `saved`: DTensors as `stored` makes them, however they lie, or whole tensors that
        every rank was given. All ranks call this at the same time."""
        found: dict[str, dict[str, Any]] = {}
        for name, given in saved.items():
            holding = self._inside.held.get(name)
            if holding is None:
                found[name] = dict(given)
            elif holding.has_part:
                found[name] = {p: self._own_part(name, p, v, holding) for p, v in given.items() if p in self.form[name]}
            elif holding.is_copy:
                found[name] = {p: v for p, v in given.items() if p in self._shared}
        for exchange in self._inside.exchanges:
            self._distribute(exchange, saved, found)
        return found

    def _own_part(self, name: str, part: str, value: Any, holding: Holding) -> Any:
        if part in self._shared:
            return value
        spread = holding.spread.like(self.form[name][part].shape)
        if _compat.is_spread_over_devices(value):
            value = as_placed(value, spread)
        elif value.ndim:
            value = spread.mine.of(value)
        stack_of_one = value.ndim > 1 and spread.shape != holding.spread.shape and value.shape[0] == 1
        return value[0] if stack_of_one and holding.spread.mine.shape[0] == 1 else value

    def _distribute(self, exchange: Exchange, saved: ByPart, found: dict[str, dict[str, Any]]) -> None:
        """Send DTensors to the owners of what they belong to; what every rank has, its owner takes."""
        items, parts, whole = [], {}, {}
        for item, name, part, spread in self._items(exchange):
            value = saved.get(name, {}).get(part)
            if isinstance(value, Tensor) and _compat.is_spread_over_devices(value):
                parts[item.name] = as_placed(value, spread)
                items.append(Item(item.name, value.dtype, item.boxes, item.owner, item.also))
                if exchange.me in item.receivers:
                    place = torch.empty(spread.shape, dtype=value.dtype, device=self._inside.device)
                    whole[item.name] = found.setdefault(name, {})[part] = place
            elif value is not None and exchange.me in item.receivers:
                found.setdefault(name, {})[part] = value
        for name in {item.name for item in exchange.items if exchange.me in item.receivers} & saved.keys():
            numbers = {p: v for p, v in saved[name].items() if p in self._shared}
            found[name] = {**found.get(name, {}), **numbers}
        every = Exchange(tuple(items), exchange.group, exchange.me, exchange.ranks)
        every.to_owners(lambda item: parts[item.name], whole, self._inside.device)
