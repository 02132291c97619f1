"""Values that a model's Python code reads from tensors: read once in a real run, and constants of the trace after it.

Whether all of an image embedding is zero, which mask torch's own layers detect, how long each text is: such a value
decides which operators run. Export sees no contents, so it cannot take the branch. A real run tells the values; a
second run, on tensors without contents, gets them in the same order, and gives out the tensors that were read. So a
graph knows what it was specialised on, and `ReadGraph` reads it again for other requests.
"""

from __future__ import annotations

import copy
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fusion_compile.passes._compat import TreeSpec, tree_flatten, tree_unflatten
from fusion_compile.passes._user_frame import is_the_users

_READERS: frozenset[Callable[..., Any]] = frozenset(
    (
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__complex__,
        Tensor.__index__,
        Tensor.__contains__,
        Tensor.equal,
        Tensor.allclose,
        torch.equal,
        torch.allclose,
        torch.is_nonzero,
    )
)


def _repeated(repeats: Tensor) -> Any:
    """The length to which ``repeat_interleave`` repeats."""
    return repeats.sum().item()


def _positions(chosen: Tensor) -> Any:
    """Where a mask chooses, one list for each of its dimensions."""
    return [places.tolist() for places in chosen.nonzero(as_tuple=True)]


_REPEATS = (torch.repeat_interleave, Tensor.repeat_interleave)
_INDEXED = (Tensor.__getitem__, Tensor.__setitem__)
_CHOSEN = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere)


@dataclass(frozen=True)
class HostRead:
    """`reader` was called at ``where``, ``"file:line"``, and gave `value`."""

    reader: Callable[..., Any]
    where: str
    value: Any


class _DataIsDetached(TorchFunctionMode):
    """Inside, ``tensor.data`` is ``tensor.detach()``: a trace loses what is written through ``.data``.

    Without gradients both give an alias of the same memory.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is Tensor.data:
            if func.__name__ == "__get__":
                return args[0].detach()
            if args[0].shape == args[1].shape and args[0].dtype == args[1].dtype:
                return args[0].copy_(args[1])
        return func(*args, **(kwargs or {}))


class Recording(TorchFunctionMode):
    """Inside, on real tensors, collect what is read in `reads`.

    `sizes`: also where masks choose and how long something is repeated, which torch can mostly trace without.
    """

    def __init__(self, *, sizes: bool = False) -> None:
        super().__init__()
        self.reads: list[HostRead] = []
        self._sizes = sizes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for reader, tensor in _sized_by(func, args, kwargs or {}) if self._sizes else ():
            with torch.DisableTorchFunctionSubclass():
                self.reads.append(HostRead(reader, _users_line(), reader(tensor)))
        value = func(*args, **(kwargs or {}))
        if func is Tensor.tolist:  # tensors of a trace do it item by item
            self.reads += [HostRead(Tensor.item, _users_line(), one) for one in _flat(value)]
        elif func in _READERS:
            self.reads.append(HostRead(func, _users_line(), copy.deepcopy(value)))
        return value


class Tracing(_DataIsDetached):
    """Inside, on tensors without contents, give the values of `reads` where they are read.

    Attributes:
        tensors: What was read so far: the tensors among the arguments of each read.
        calls: For each read its place in `reads`, and its arguments with the tensors left out.
    """

    def __init__(self, reads: Sequence[HostRead]) -> None:
        super().__init__()
        self._reads = reads
        self._next = 0
        self.tensors: list[Tensor] = []
        self.calls: list[tuple[HostRead, TreeSpec, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READERS and (read := self._of(func)) is not None:
            leaves, structure = tree_flatten((args, kwargs or {}))
            self.tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            rest = tuple(_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            self.calls.append((read, structure, rest))
            return copy.deepcopy(read.value)
        known = [(tensor, self._size_of(reader, tensor)) for reader, tensor in _sized_by(func, args, kwargs or {})]
        if known and all(size is not None for _, size in known):
            if func in _CHOSEN:
                return _chosen(known[0], as_tuple=bool((kwargs or {}).get("as_tuple", False)))
            args, kwargs = _with_sizes(func, args, kwargs or {}, known)
        return super().__torch_function__(func, types, args, kwargs)

    def _size_of(self, reader: Callable[..., Any], tensor: Tensor) -> Any:
        read = self._of(reader)
        if read is None or tensor.dim() == 0:
            return None
        leaves, structure = tree_flatten(((tensor,), {}))
        self.tensors.append(tensor)
        self.calls.append((read, structure, (_TENSOR,) * len(leaves)))
        return read.value

    def _of(self, func: Any) -> HostRead | None:
        """The next recorded read of this kind at this line; a trace may leave out what a real run checks."""
        where = _users_line()
        for at in range(self._next, len(self._reads)):
            if self._reads[at].reader is func and self._reads[at].where == where:
                self._next = at + 1
                return self._reads[at]
        return None


def _sized_by(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[tuple[Callable[..., Any], Tensor]]:
    """The tensors whose contents decide the size of what `func` gives, each with what reads the size."""
    if func in _REPEATS and kwargs.get("output_size") is None:
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return [(_repeated, repeats)] if isinstance(repeats, Tensor) else []
    if func in _INDEXED:
        places = args[1] if isinstance(args[1], tuple) else (args[1],)
        return [(_positions, one) for one in places if isinstance(one, Tensor) and one.dtype is torch.bool]
    if func in _CHOSEN and args and "out" not in kwargs:
        return [(_positions, args[0])]
    return []


def _chosen(known: tuple[Tensor, Any], *, as_tuple: bool) -> Any:
    """What ``nonzero`` gives, as constants."""
    mask, places = known
    found = [torch.tensor(place, dtype=torch.int64, device=mask.device) for place in places]
    return tuple(found) if as_tuple else torch.stack(found, dim=1)


def _with_sizes(
    func: Any, args: Any, kwargs: Mapping[str, Any], known: Sequence[tuple[Tensor, Any]]
) -> tuple[Any, dict[str, Any]]:
    """The arguments with numbers in place of what data decides."""
    if func in _REPEATS:
        return args, {**kwargs, "output_size": known[0][1]}
    sizes = iter(size for _, size in known)
    places: list[Any] = []
    for one in args[1] if isinstance(args[1], tuple) else (args[1],):
        if isinstance(one, Tensor) and one.dtype is torch.bool:
            places += [torch.tensor(place, dtype=torch.int64, device=one.device) for place in next(sizes)]
        else:
            places.append(one)
    return (args[0], tuple(places), *args[2:]), dict(kwargs)


class ReadGraph:
    """What a trace read, as a graph of what decides it."""

    def __init__(
        self, graph_module: fx.GraphModule, calls: Sequence[tuple[HostRead, TreeSpec, tuple[Any, ...]]]
    ) -> None:
        self.graph_module, self._calls = graph_module, tuple(calls)

    @property
    def graph(self) -> fx.Graph:
        """The graph of what was read."""
        return self.graph_module.graph

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that decide what was read."""
        return tuple(str(n.target) for n in self.graph.find_nodes(op="placeholder"))

    def read_nodes(self) -> list[tuple[fx.Node, HostRead]]:
        """The nodes that were read, each with its read."""
        nodes = iter(_outputs(self.graph))
        return [(next(nodes), read) for read, _, rest in self._calls for leaf in rest if leaf is _TENSOR]

    def holds(self, values: Mapping[str, Tensor]) -> bool:
        """Whether reading gives for the inputs `values`, by name, what it gave; waits for the device.

        What comes after a read was traced for its value, so nothing after the first other value is computed.
        """
        computed: dict[fx.Node, Any] = {}
        outputs = iter(_outputs(self.graph))
        asked = [([next(outputs) for leaf in call[2] if leaf is _TENSOR], call) for call in self._calls]
        for node in self.graph.nodes:
            if node.op == "placeholder":
                computed[node] = values[str(node.target)]
            elif node.op == "get_attr":
                computed[node] = operator.attrgetter(str(node.target))(self.graph_module)
            elif node.op == "call_function":
                computed[node] = node.target(
                    *fx.map_arg(node.args, computed.__getitem__), **fx.map_arg(node.kwargs, computed.__getitem__)
                )
            while asked and all(read in computed for read in asked[0][0]):
                nodes, (read, structure, rest) = asked.pop(0)
                tensors = iter([computed[n] for n in nodes])
                args, kwargs = tree_unflatten([next(tensors) if x is _TENSOR else x for x in rest], structure)
                if not _alike(read.reader(*args, **kwargs), read.value):
                    return False
        return True


def separate_reads(
    graph_module: fx.GraphModule, n_outputs: int, calls: Sequence[tuple[HostRead, TreeSpec, tuple[Any, ...]]]
) -> ReadGraph | None:
    """Take the outputs after the first `n_outputs`, which are the tensors that were read, out of `graph_module`."""
    if not calls:
        return None
    output = graph_module.graph.output_node()
    everything = _outputs(graph_module.graph)
    decides: set[fx.Node] = set()
    waiting = list(everything[n_outputs:])
    while waiting:
        node = waiting.pop()
        if node not in decides:
            decides.add(node)
            waiting += node.all_input_nodes
    readings = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in decides:  # assertions of the whole graph would hold all of its inputs
            copies[node] = readings.node_copy(node, copies.__getitem__)
    readings.output(tuple(copies[n] for n in everything[n_outputs:]))
    output.args = (everything[:n_outputs],)
    return ReadGraph(fx.GraphModule(graph_module, readings), calls)


def _flat(numbers: Any) -> list[Any]:
    return [one for each in numbers for one in _flat(each)] if isinstance(numbers, list) else [numbers]


def _outputs(graph: fx.Graph) -> tuple[Any, ...]:
    outputs: Any = graph.output_node().args[0]
    return tuple(outputs)


_TENSOR = object()
"""Stands for a tensor among the arguments of a read."""


def _users_line() -> str:
    frame = sys._getframe(2)
    while frame.f_back is not None and not is_the_users(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _alike(value: Any, before: Any) -> bool:
    """Whether two values read from tensors are the same numbers, of the same kind; nan is nan."""
    if type(value) is not type(before):
        return False
    if isinstance(value, (list, tuple)):
        return len(value) == len(before) and all(map(_alike, value, before))
    if isinstance(value, np.ndarray):
        forms = (value.dtype, value.shape) == (before.dtype, before.shape)
        return forms and bool(value.tobytes() == before.tobytes())
    return bool(value == before or (value != value and before != before))
