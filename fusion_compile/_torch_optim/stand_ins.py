"""Plain parameters in the place of DTensors: what this rank updates of a group whose parameters lie on several ranks.

A matrix must be whole to be orthogonalized, so each has an owner; whatever may be cut stays where it lies. All of a
parameter group then works on stand-ins as on any parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile import _compat
from fusion_compile._ranks.shards.exchange import Item
from fusion_compile._ranks.shards.holdings import Holding, Wanted, exchanges, holdings
from fusion_compile._ranks.shards.owners import cost_of
from fusion_compile._ranks.shards.spread import Spread, as_placed, local_part
from fusion_compile._state.routing import Route
from fusion_compile._types import Tensors
from fusion_compile.optim._transform import ELEMENTWISE


class StandIns:
    """Stand-ins of the DTensors among `covers`; all ranks make them at the same time.

    `entry_by_entry`: whether elementwise parameters may be cut. `held`: by name, who has what. `parameters`: what this
    rank updates, plain parameters themselves, in the order of `covers`.
    """

    def __init__(self, covers: Mapping[str, nn.Parameter], routes: Mapping[str, Route], entry_by_entry: bool) -> None:
        self.covers = dict(covers)
        self.spread = {n: p for n, p in covers.items() if _compat.is_spread_over_devices(p)}
        self.held = holdings(self.spread, {n: _wanted(routes[n], p, entry_by_entry) for n, p in self.spread.items()})
        self.exchanges = exchanges(self.spread, self.held)
        self.device = local_part(next(iter(self.spread.values()))).device
        whole = {n: torch.empty(p.shape, dtype=p.dtype, device=self.device) for n, p in self._mine().items()}
        with torch.no_grad():
            self.send(self.parts(), whole)
        self.parameters: dict[str, nn.Parameter] = {}
        for name, p in covers.items():
            if name not in self.held:
                self.parameters[name] = p
            elif name in whole or self.held[name].has_part:
                own = whole[name] if name in whole else local_part(p).detach().clone()
                self.parameters[name] = nn.Parameter(own, requires_grad=p.requires_grad)

    def _mine(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.spread.items() if self.held[n].has_whole}

    def route(self, route: Route) -> Route:
        """The route of a stand-in: that of its parameter, with its own shape."""
        return replace(route, shape=tuple(self.parameters[route.name].shape))

    def parts(self) -> Tensors:
        """This rank's parts of the parameters."""
        return {n: local_part(p).detach() for n, p in self.spread.items()}

    def gradient(self, name: str, g: Tensor) -> Tensor:
        """This rank's part of a gradient. RuntimeError for one that is no DTensor, or of another shape."""
        p = self.covers[name]
        if name not in self.held:
            if _compat.is_spread_over_devices(g):
                raise RuntimeError(
                    f"the gradient of {name} {list(p.shape)} is a DTensor and the parameter is none; give this rank's "
                    f"own gradient, p.grad.full_tensor()."
                )
            return g
        if not _compat.is_spread_over_devices(g) or g.shape != p.shape:
            raise RuntimeError(
                f"the gradient of {name} {list(p.shape)} is a {type(g).__name__} {list(g.shape)} and the parameter a "
                f"DTensor; give a DTensor of the parameter's shape, as the backward of a sharded model does."
            )
        return as_placed(g, self.held[name].spread)

    def send(self, parts: Tensors, whole: Tensors) -> None:
        """Send `parts`, and write what this rank owns into `whole`. A part that is missing is sent as zeros."""

        def part(item: Item) -> Tensor:
            given = parts.get(item.name)
            mine = self.held[item.name].spread.mine
            return torch.zeros(mine.shape, dtype=item.dtype, device=self.device) if given is None else given

        for exchange in self.exchanges:
            exchange.to_owners(part, whole, self.device)

    def give_back(self) -> None:
        """Write the stand-ins into the parameters, on all ranks."""
        own = {n: p.detach() for n, p in self.parameters.items()}
        into = self.parts()
        for exchange in self.exchanges:
            exchange.to_parts(own, lambda item: into[item.name], self.device)
        for name, holding in self.held.items():
            if holding.has_part:
                into[name].copy_(own[name])
        torch.autograd.graph.increment_version(list(self.spread.values()))

    def take(self) -> list[str]:
        """Write the parameters, which somebody has changed, into the stand-ins. Names of those that differed."""
        parts = self.parts()
        whole = {n: torch.empty_like(self.parameters[n]) for n in self._mine()}
        self.send(parts, whole)
        changed = []
        for name, holding in self.held.items():
            now = whole.get(name, parts[name] if holding.has_part else None)
            if now is not None and not torch.equal(now, self.parameters[name]):
                self.parameters[name].copy_(now)
                changed.append(name)
        return changed


def _wanted(route: Route, p: Any, entry_by_entry: bool) -> Wanted:
    elementwise = route.role == ELEMENTWISE

    def by_parts(spread: Spread) -> bool:
        if elementwise:
            return entry_by_entry
        return route.stack and spread.cuts_only_before(len(spread.shape) - 2)

    cost = float(p.numel())
    if not elementwise:
        rows, columns = route.matrix
        cost = cost_of((rows, columns)) * p.numel() / max(1, rows * columns)
    return Wanted(by_parts, cost)


def is_held(holding: Holding | None) -> bool:
    """Whether what this rank has of a parameter counts. None: a parameter that is no DTensor."""
    return holding is None or holding.has_part or (holding.has_whole and not holding.is_copy)
