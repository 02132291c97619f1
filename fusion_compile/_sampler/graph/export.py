"""Export a denoiser for one call as an ATen graph whose inputs are the weights and the call's tensors, by name."""

from __future__ import annotations

import contextlib
import logging
import types
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from fusion_compile._capture.python_state.callables import free_variables
from fusion_compile._capture.python_state.slots import Slot
from fusion_compile._capture.python_state.whose_code import is_foreign
from fusion_compile._capture.rehearsal.contents import as_it_was
from fusion_compile._capture.watch.reads import Reads, reading
from fusion_compile._compat import fake_mode
from fusion_compile._sampler.graph.call import Call, Dim, invoke
from fusion_compile._sampler.graph.host_reads import HostRead, ReadGraph, Recording, Tracing, separate_reads
from fusion_compile._sampler.graph.opened import Before, Output
from fusion_compile._sampler.graph.refusal import refusal
from fusion_compile._sampler.weights.unservable import Unservable
from fusion_compile.passes import drop_metadata_reads, run_passes, split_concatenations


@dataclass(frozen=True)
class DenoiserGraph:
    """`graph_module`: an ATen graph with flat inputs and one tuple of outputs.

    `weights`: input name -> the model's own parameter or buffer (or a constant of the trace). `full_names`: input name
    -> the parameter's or buffer's full name; constants are left out. `inputs`: input names of the call's tensors, in
    order. `output`: makes the model's output of the graph's. `reads`: the values that the trace was specialised on, or
    None. `outside`: globals and closures that the model's Python code read. `taken`: what it leaves in lists and
    dictionaries among its arguments out of which it takes items.
    """

    graph_module: fx.GraphModule
    weights: dict[str, Tensor]
    full_names: dict[str, str]
    inputs: tuple[str, ...]
    output: Output
    reads: ReadGraph | None = None
    outside: tuple[Slot, ...] = ()
    taken: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def tidied(self) -> DenoiserGraph:
        """Remove dead nodes, metadata reads that look like dependencies, and concatenations; sizes must be numbers."""
        for graph_module in (self.graph_module, *([] if self.reads is None else [self.reads.graph_module])):
            graph_module.graph.eliminate_dead_code()
            run_passes(graph_module, [drop_metadata_reads, split_concatenations])
        return self


class _Failed(Exception):
    """The model's own code failed in a trace. torch prints its whole graph for an exception that it can mark."""

    @property
    def partial_fx_graph(self) -> None:
        raise AttributeError

    @partial_fx_graph.setter
    def partial_fx_graph(self, graph: object) -> None: ...


class _FlatCall(nn.Module):
    """The model as a module of the call's tensors; everything else in the call is a constant of the trace."""

    def __init__(self, model: nn.Module, run: Callable[..., tuple[Any, ...]]) -> None:
        super().__init__()
        self.model = model
        self.run = run

    def forward(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.run(tensors)


def trace_denoiser(model: nn.Module, call: Call, reads: Sequence[HostRead] = ()) -> DenoiserGraph:
    """Export `model` for the shapes of `call`; `reads` are values that its Python code reads from tensors.

    Raises ValueError if the model cannot be exported, or writes a buffer or an input; `Unservable` if it writes into a
    container or object among its arguments, or returns an object of which nothing is known.
    """
    return export_denoiser(model, call, reads=reads).tidied()


def record_reads(model: nn.Module, call: Call, *, sizes: bool = False) -> list[HostRead]:
    """Run `model` and return what its Python code reads from tensors; leaves nothing behind in it or in the call.

    `sizes`: also what decides the size of a result.
    """
    recording = Recording(sizes=sizes)
    with as_it_was({"model": model}), torch.no_grad():
        arguments = call.rebuild([t.detach().clone() for t in call.tensors])
        with recording:
            invoke(model, call, arguments)
    return recording.reads


def export_denoiser(
    model: nn.Module, call: Call, symbolic: Collection[Dim] = (), reads: Sequence[HostRead] = ()
) -> DenoiserGraph:
    """Export as `trace_denoiser`, untidied, with symbols for the sizes in `symbolic` that the model does not fix."""
    runs: list[tuple[Output, Tracing, str | None, dict[str, tuple[Any, ...]]]] = []
    read_by_code: list[Reads] = []

    def run(tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        arguments = call.rebuild(tensors)
        before = Before(arguments)
        try:
            with Tracing(reads) as tracing, reading(globals_alone=True) as found:
                leaves, output = Output.of(invoke(model, call, arguments))
        except Exception as error:
            raise _Failed from error
        runs.append((output, tracing, before.written(arguments), before.taken_out(arguments)))
        read_by_code.append(found)
        return (*leaves, *tracing.tensors)

    inputs = tuple(t.detach() for t in call.tensors)  # export marks what it is given as dynamic, for torch.compile too
    dims = [{axis: torch.export.Dim.AUTO for t, axis in symbolic if t == i} for i in range(len(call.tensors))]
    try:
        with as_it_was({"model": model}), warnings.catch_warnings(), _no_log(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.export warns about itself (LeafSpec, 2.13)
            exported = torch.export.export(
                _FlatCall(model, run), inputs, dynamic_shapes=(tuple(dims),) if symbolic else None, strict=False
            ).run_decompositions({})
    except Exception as failure:
        own = failure.__cause__ if isinstance(failure, _Failed) else None
        error = own if isinstance(own, Exception) else failure
        raise refusal(type(model).__name__, call.key.sizes, error, lambda: _call_on_fakes(model, call)) from error
    output, tracing, changed, taken = runs.pop()
    read_by_code[-1].drop_temporaries()
    if changed is not None:
        raise Unservable(
            f"{type(model).__name__} writes into its argument {changed}, a {type(call.given[changed]).__name__}, which "
            f"a graph of tensors cannot do."
        )
    if output.unknown is not None:
        raise Unservable(
            f"{type(model).__name__} returns a {output.unknown.__name__}, which a graph of tensors cannot make; return "
            f"tensors, in tuples, dictionaries or dataclasses."
        )
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise ValueError(
                f"{type(model).__name__} writes {spec.target} in its forward ({spec.kind.name}); a table would be "
                f"computed from what it wrote before. Make forward free of in-place writes to buffers and inputs."
            )
    graph_module = exported.graph_module
    weights: dict[str, Tensor] = {}
    full_names: dict[str, str] = {}
    names: list[str] = []
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    for spec, node in zip(exported.graph_signature.input_specs, placeholders, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            names.append(node.name)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target is not None:
            full_names[node.name] = spec.target.removeprefix("model.")
            weights[node.name] = find_tensor(model, full_names[node.name])
        elif spec.target is not None and isinstance(exported.constants.get(spec.target), Tensor):
            weights[node.name] = exported.constants[spec.target]
        else:
            raise ValueError(
                f"{type(model).__name__} uses {spec.target} ({spec.kind.name}), which a table cannot hold."
            )
    read = separate_reads(graph_module, output.n_tensors, tracing.calls)
    named = _rename_inputs(graph_module.graph, names, call.owners)
    if read is not None:
        _rename_like(read.graph, names, named)
    outside = (*read_by_code[-1].slots, *_cells(model))
    return DenoiserGraph(graph_module, weights, full_names, named, output, read, outside, taken)


def find_tensor(model: nn.Module, full_name: str) -> Tensor:
    """The parameter or buffer of that name; raises AttributeError if there is none."""
    prefix, _, key = full_name.rpartition(".")
    owner = model.get_submodule(prefix)
    parameter = owner._parameters.get(key)
    found = owner._buffers.get(key) if parameter is None else parameter
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no parameter or buffer {full_name!r}.")
    return found


def _cells(model: nn.Module) -> Iterator[Slot]:
    """What the methods of the model's classes close over."""
    for kind in {each for module in model.modules() for each in type(module).__mro__ if not is_foreign(each)}:
        for method in vars(kind).values():
            if isinstance(method, types.FunctionType):
                yield from (Slot(cell, None, name) for name, cell in free_variables(method) if name != "__class__")


@contextlib.contextmanager
def _no_log() -> Iterator[None]:
    """Inside, torch does not log what stands in the error that it raises."""
    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _rename_inputs(graph: fx.Graph, inputs: list[str], owners: tuple[str, ...]) -> tuple[str, ...]:
    """Name the call's inputs after their arguments: ``t`` instead of export's ``tensors_1``."""
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    for name, owner in zip(inputs, owners, strict=True):
        nodes[name]._rename(owner)
        nodes[name].target = nodes[name].name
    return tuple(nodes[name].name for name in inputs)


def _rename_like(graph: fx.Graph, names: Sequence[str], named: Sequence[str]) -> None:
    """Give the inputs `names` of a part of a graph, as far as it has them, the names of the whole graph's."""
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    for old, new in zip(names, named, strict=True):
        if old in nodes:
            nodes[old]._rename(new)
            nodes[old].target = nodes[old].name


def _call_on_fakes(model: nn.Module, call: Call) -> object:
    with as_it_was({"model": model}), fake_mode() as mode, torch.no_grad():
        return invoke(model, call, call.rebuild([mode.from_tensor(t) for t in call.tensors]))
