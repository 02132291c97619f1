"""The graphs of one model by shape: exported for the first shape, exported with symbols for the next, then derived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from fusion_compile._progress import stage
from fusion_compile._sampler.graph.call import Call, CallKey, Dim, name_dim
from fusion_compile._sampler.graph.export import (
    DenoiserGraph,
    export_denoiser,
    find_tensor,
    record_reads,
    trace_denoiser,
)
from fusion_compile._sampler.graph.symbolic import SymbolicGraph
from fusion_compile._sampler.weights.unservable import Unservable
from fusion_compile._say_once import SayOnce

MAX_SYMBOLIC = 4
"""Symbolic graphs kept for calls that differ in sizes alone; a branch on a size in the model makes a second one."""


class GraphsByShape:
    """Graphs of `model`.

    `say_once`: warns of what in the model makes a new shape slow. `n_exports`: how often the model was exported, which
    takes longest by far.
    """

    def __init__(self, model: nn.Module, say_once: SayOnce) -> None:
        self._model, self._say_once = model, say_once
        self._families: dict[tuple[Any, ...], _Family] = {}
        self.n_exports = 0

    def drop_all(self) -> None:
        """Drop all graphs: the model's code or structure changed."""
        self._families.clear()

    def of(self, call: Call) -> DenoiserGraph:
        """The graph for the sizes of `call`, as `trace_denoiser` gives it; raises ValueError as that does."""
        family = self._families.setdefault(call.key.family, _Family(call.key))
        why = ""
        for symbolic in [*family.symbolic]:
            if not self._is_current(symbolic.traced):
                family.symbolic.remove(symbolic)
            elif refusal := symbolic.refuses(call):
                why = f" again ({refusal})"
            elif (graph := self._specialise(symbolic, call)) is not None:
                return graph
        self.n_exports += 1
        with stage(f"exporting {type(self._model).__name__}{why}"):
            if family.reads is not None:
                reads = record_reads(self._model, call, sizes=family.reads == "sizes")
                return trace_denoiser(self._model, call, reads)
            if varying := family.varying(call.key):
                graph = self._export_symbolic(call, varying, family)
                if graph is not None:
                    return graph
                self.n_exports += 1
            return self._trace(call, family)

    def _trace(self, call: Call, family: _Family) -> DenoiserGraph:
        """Trace without contents, or else specialised on what the model's Python code reads from tensors."""
        try:
            return trace_denoiser(self._model, call)
        except Unservable:
            raise
        except ValueError as refused:
            said = refused
        kind: Literal["values", "sizes"]
        for kind in ("values", "sizes"):
            try:
                reads = record_reads(self._model, call, sizes=kind == "sizes")
            except Exception:  # the model itself fails, which is said already
                raise said from None
            if not reads:
                continue
            self.n_exports += 1
            try:
                graph = trace_denoiser(self._model, call, reads)
            except ValueError as refused:
                said = refused
            else:
                family.reads = kind
                return graph
        raise said

    def _export_symbolic(self, call: Call, varying: set[Dim], family: _Family) -> DenoiserGraph | None:
        name = type(self._model).__name__
        try:
            symbolic = SymbolicGraph(export_denoiser(self._model, call, varying))
        except ValueError as error:
            family.fixed |= varying
            sizes = _named(call, varying)
            self._say_once(
                f"no symbols {sizes}",
                f"{name} cannot be exported with symbols for {sizes}, so each size is exported by itself. {error}",
            )
            return None
        pinned = symbolic.fixed(varying)
        if fixed := family.pin(pinned, call.key):
            sizes = _named(call, fixed)
            where = next((f" ({pinned[dim]})" for dim in sorted(fixed) if pinned[dim]), "")
            self._say_once(
                f"fixed {sizes}",
                f"{name} makes numbers of {sizes}{where}: every size is exported by itself, which takes as long as "
                f"the first call. Call with few of them.",
            )
        graph = self._specialise(symbolic, call)
        if graph is None:
            family.fixed |= varying
        elif set(pinned) < varying:
            family.symbolic.append(symbolic)
        return graph

    def _specialise(self, symbolic: SymbolicGraph, call: Call) -> DenoiserGraph | None:
        try:
            return symbolic.specialise(call)
        except Exception as error:
            self._say_once(
                "not for this size",
                f"{type(self._model).__name__} as traced with symbolic sizes does not work for "
                f"{[list(sizes) for sizes in call.key.sizes]} ({type(error).__name__}: {error}); it is exported for "
                f"these by itself.",
            )
            return None

    def _is_current(self, traced: DenoiserGraph) -> bool:
        try:
            return all(find_tensor(self._model, n) is traced.weights[name] for name, n in traced.full_names.items())
        except AttributeError:
            return False


class _Family:
    """Graphs and findings for calls that differ in sizes alone.

    `fixed`: sizes that the model always turns into numbers. `symbolic`: graphs, the newest last. `reads`: what the
    trace must be given of tensors' contents: values alone, or also the sizes that data decide.
    """

    def __init__(self, first: CallKey) -> None:
        self._first = first.sizes
        self._varied: set[Dim] = set()
        self._pinned: dict[Dim, set[int]] = {}
        self.fixed: set[Dim] = set()
        self.reads: Literal["values", "sizes"] | None = None
        self.symbolic: deque[SymbolicGraph] = deque(maxlen=MAX_SYMBOLIC)

    def varying(self, key: CallKey) -> set[Dim]:
        """The sizes that have changed so far and can be symbols in this call; torch treats sizes 0 and 1 specially."""
        self._varied |= {
            (tensor, axis)
            for tensor, (before, now) in enumerate(zip(self._first, key.sizes, strict=True))
            for axis, (a, b) in enumerate(zip(before, now, strict=True))
            if a != b
        }
        return {(tensor, axis) for tensor, axis in self._varied - self.fixed if key.sizes[tensor][axis] > 1}

    def pin(self, dims: Iterable[Dim], key: CallKey) -> set[Dim]:
        """Record that a trace of this call turned `dims` into numbers; return those that are `fixed` because of it.

        One trace proves little: a model with a special case for a batch of 2 fixes the batch only there.
        """
        for tensor, axis in dims:
            self._pinned.setdefault((tensor, axis), set()).add(key.sizes[tensor][axis])
        fixed = {dim for dim in dims if len(self._pinned[dim]) > 1}
        self.fixed |= fixed
        return fixed


def _named(call: Call, dims: Iterable[Dim]) -> str:
    return ", ".join(name_dim(call.owners, dim) for dim in sorted(dims))
