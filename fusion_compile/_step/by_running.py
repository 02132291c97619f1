"""A step captured by running it: from a pure step to a graph over flat inputs, and back to a function of the state."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion_compile._capture.by_running.symbolic_sizes import SizeFixed, SymbolicSizes
from fusion_compile._capture.by_running.trace import lift_constants, modules_named, run_on_fakes
from fusion_compile._capture.rehearsal.contents import Contents
from fusion_compile._capture.rehearsal.reach import Reach
from fusion_compile._compat import mark_input_static
from fusion_compile._program.gathers import gather_late
from fusion_compile._program.lower import lower_graph
from fusion_compile._program.program import CompiledRegion
from fusion_compile._program.regions import lower_by_region
from fusion_compile._program.shared_regions import SharedRegions
from fusion_compile._step import batches
from fusion_compile._step.host_reads import not_on_fakes_message, refused_graph_message
from fusion_compile._step.operands import NotAnOperand
from fusion_compile._step.shapes import Dims
from fusion_compile._step.update import donated
from fusion_compile._types import Tensors

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


class CapturedStep:
    """`advance` as one graph in ATen operators, forward, backward and optimizer.

    Its inputs are the tensors of the state, those of the batch, and those that user code closes over (frozen weights,
    a teacher's buffers), which are read where they lie at every run.

    `model`: names the modules in which its operators are called. `dims`: the axes of the batch's tensors whose size is
    a symbol. Raises SizeFixed if one is not.

    Attributes:
        graph: What was captured. Each placeholder's ``meta["label"]`` says what it is.
        constants: The tensors that user code closes over.
        is_cuda: Whether it runs on a GPU.
        regions: The regions that it was compiled in; none where the graph was compiled as one.
    """

    def __init__(
        self,
        advance: Callable[[Tensors, tuple[Any, ...]], Tensors],
        state: Tensors,
        batch: tuple[Any, ...],
        model: nn.Module | None = None,
        dims: Dims = (),
    ) -> None:
        self._keys = list(state)
        self.is_cuda = any(tensor.is_cuda for tensor in state.values())
        self._fresh: list[str] = []
        step, n = donated(advance), len(state)

        def flat(*tensors: Tensor) -> list[Tensor]:
            own = dict(zip(self._keys, tensors[:n], strict=True))
            fresh = step(own, batches.with_leaves(batch, tensors[n:]))
            self._fresh = list(fresh)
            return list(fresh.values())

        inputs = {f"state/{key}": tensor for key, tensor in state.items()}
        inputs |= {_as_label(path): leaf for path, leaf in batches.leaves(batch) if isinstance(leaf, Tensor)}
        sizes = {(n + i, axis) for i, axes in enumerate(dims) for axis in axes}
        self._symbols = SymbolicSizes(list(inputs.values()), sizes) if sizes else None
        with contextlib.nullcontext() if model is None else modules_named(model):
            self.graph: fx.GraphModule = run_on_fakes(flat, inputs, symbols=self._symbols)
        self.constants = lift_constants(self.graph)
        for node in self.graph.graph.find_nodes(op="placeholder"):
            if not node.meta["label"].startswith("batch/"):
                mark_input_static(node)
        self._body: Callable[..., Any] = self.graph
        self.regions: tuple[CompiledRegion, ...] = ()

    def gather_late(self) -> int:
        """Let weights of other ranks lie in memory while they are used; how many collectives there are more."""
        more = gather_late(self.graph.graph)
        self.graph.recompile()
        return more

    def compile(
        self,
        state: Tensors,
        batch: tuple[Any, ...],
        *,
        mode: str,
        backend: str,
        shared: SharedRegions | None = None,
    ) -> None:
        """Compile the graph, as one, or region by region with those of `shared`. Runs nothing. Raises ValueError if the
        compiler does not take it, SizeFixed if it makes a number of a size."""
        inputs, symbols = self._inputs(state, batch), self._symbols
        if symbols is not None:
            inputs = [*symbols.fakes, *map(symbols.beside, self.constants)]
        try:
            if shared is not None:
                lowered = lower_by_region(self.graph, inputs, shared, mode=mode, backend=backend)
                self._body, self.regions = lowered.run, lowered.regions
            else:
                self._body, self.regions = lower_graph(self.graph, inputs, mode=mode, backend=backend), ()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the graph itself was captured
            raise ValueError(refused_graph_message(error)) from error
        if symbols is not None:
            symbols.settle()

    def fits(self, state: Tensors, batch: tuple[Any, ...]) -> bool:
        """Whether the graph is right for the sizes of `batch`, which has the ranks and dtypes of the first."""
        return self._symbols is None or self._symbols.fit(self._inputs(state, batch))

    def uncompiled(self, state: Tensors, batch: tuple[Any, ...]) -> None:
        """Take one step in place, operator by operator."""
        with torch.no_grad():
            self.graph(*self._inputs(state, batch))

    def __call__(self, state: Tensors, batch: tuple[Any, ...]) -> Tensors:
        """Take one step in place; the entries that the state does not have yet are returned."""
        with torch.no_grad():
            fresh = self._body(*self._inputs(state, batch))
        return dict(zip(self._fresh, fresh, strict=True))

    def _inputs(self, state: Tensors, batch: tuple[Any, ...]) -> list[Tensor]:
        return [*map(state.__getitem__, self._keys), *batches.tensors(batch), *self.constants]


def captured_step(
    roots: Mapping[str, Any],
    advance: Callable[[Tensors, tuple[Any, ...]], Tensors],
    state: Tensors,
    batch: tuple[Any, ...],
    model: nn.Module,
    dims: Dims = (),
) -> CapturedStep:
    """Capture `advance`, and put back what it leaves in whatever can be reached from `roots`. `dims`: for a band of
    sizes.

    Raises NotAnOperand, SizeFixed, or ValueError naming the line that does not run on tensors without data.
    """
    contents = Contents(roots)
    try:
        step = CapturedStep(advance, state, batch, model, dims)
        if kept := dims and [slot.label for slot, value in Reach(roots).slots() if isinstance(value, _SYMBOLS)]:
            raise SizeFixed(f"{kept[0]} keeps a size, which is another at each shape.")
        return step
    except (NotAnOperand, SizeFixed):
        raise
    except Exception as error:  # of any kind: the loss itself has run before, on real tensors
        raise ValueError(not_on_fakes_message(error)) from error
    finally:
        contents.restore()


def _as_label(path: str) -> str:
    """``batch[0]['x']`` as ``batch/0/x``, as inputs of a step that is read are called."""
    return re.sub(r"\['?(.*?)'?\]|\.(\w+)", lambda found: "/" + (found[1] or found[2]), path)
