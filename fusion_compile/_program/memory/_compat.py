"""Private API of AOTAutograd's partitioner: which values of a forward its backward should keep; and of Inductor: a
value that gets memory where it stands, over which memory a kernel writes its result, and what is written around
kernels."""

from __future__ import annotations

import builtins
import contextlib
import dataclasses
import functools
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from fusion_compile._compat import fake_mode
from fusion_compile.passes._graph import impurity

_NEEDED = ("NodeInfo", "choose_saved_values_set", "get_default_op_list")


def can_choose() -> bool:
    """Whether this torch has the partitioner's choice where it is looked for."""
    try:
        from torch._functorch import partitioners
        from torch.utils._ordered_set import OrderedSet  # noqa: F401
    except ImportError:
        return False
    return all(hasattr(partitioners, name) for name in _NEEDED)


def saved_values(
    nodes: Sequence[fx.Node], forward: Collection[fx.Node], backward: Collection[fx.Node], budget: float
) -> set[fx.Node]:
    """The nodes whose values the backward should read from the forward, as torch.compile's partitioner chooses them.

    Args:
        nodes: Of a graph, in order; each has a value.
        forward: Those that may be computed again. What is neither in here nor in `backward` is there anyway.
        backward: Those that cannot run in the forward.
        budget: Between 0 (keep least) and 1 (compute again what costs next to nothing).
    """
    from torch._functorch import partitioners
    from torch.utils._ordered_set import OrderedSet

    before = [n for n in nodes if n not in backward]
    given = [n for n in before if n not in forward]
    for node in reversed(nodes):
        _mark(node, 0 if node in backward else min([10**9, *(_distance(user) + 1 for user in node.users)]))
    order = {node: i for i, node in enumerate(before)}
    free = OrderedSet(given)
    behind = OrderedSet(backward)
    info = partitioners.NodeInfo(
        [n for n in given if n.op == "placeholder"], OrderedSet(before), behind, behind, OrderedSet(), order, free
    )
    graph: Any = SimpleNamespace(nodes=list(nodes), owning_module=None)
    once = set(filter(_must_not_run_again, forward))
    with _kept([*(n for n in given if n.op == "call_function"), *once]):
        chosen = partitioners.choose_saved_values_set(graph, info, memory_budget=budget)
    return {*chosen, *once}


def _mark(node: Any, distance: int) -> None:
    node.dist_from_bw = distance


def _distance(node: Any) -> int:
    return getattr(node, "dist_from_bw", 10**9)


@contextlib.contextmanager
def _kept(nodes: Collection[fx.Node]) -> Iterator[None]:
    """Inside, the partitioner keeps these nodes if it needs them."""
    before = [(node, node.meta.get("recompute")) for node in nodes]
    for node in nodes:
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        for node, policy in before:
            if policy is None:
                node.meta.pop("recompute", None)
            else:
                node.meta["recompute"] = policy


def _must_not_run_again(node: fx.Node) -> bool:
    """Whether a second run of `node` could give or do something else: it draws, writes, or is no plain operator."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return not (callable(op) and getattr(op, "__module__", "") == "_operator")
    return impurity(node) is not None or "inductor_random" in str(op) or "inductor_seed" in str(op)


def fuses(node: fx.Node) -> bool:
    """Whether Inductor can compute `node` within another kernel: it is elementwise, a view or a sum."""
    found: bool = _operators().is_fusible(node)
    return found


@functools.cache
def _operators() -> Any:
    from torch._functorch import partitioners

    return partitioners.get_default_op_list()


_LIBRARY: Any = torch.library.Library("fusion_compile", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]
_LIBRARY.define("in_memory(Tensor x) -> Tensor")
_LIBRARY.impl("in_memory", lambda x: x.clone(), "CompositeExplicitAutograd")
_LIBRARY.impl("in_memory", lambda x: torch.empty_like(x), "Meta")


def in_memory() -> Any:
    """The operator by which a value gets memory where it stands in a graph for Inductor; it changes nothing else."""
    from torch._inductor import lowering

    op = torch.ops.fusion_compile.in_memory.default
    if op not in lowering.lowerings:

        @lowering.register_lowering(op, type_promotion_kind=None)
        def realized(x: Any) -> Any:
            x.realize()
            return x

    return op


@contextlib.contextmanager
def written_over_what_is_read_for_the_last_time() -> Iterator[None]:
    """Inside, a kernel of Inductor's writes its result over a tensor that it was given and that nobody reads any more.

    torch does so, but for two cases, both of which a whole step meets everywhere. A bank of weights is written at the
    end, so whatever was computed from a weight must have been computed before; torch counts that order as one more
    reader, and never writes over it. And a value that is computed once within a kernel (a tanh on a CPU) has a name and
    no memory; torch takes it for the first tensor to write over, and gives the result fresh memory. Where torch has
    moved what this replaces, nothing happens.
    """
    from torch._inductor import scheduler
    from torch.utils._ordered_set import OrderedSet

    node: Any = scheduler.BaseSchedulerNode
    theirs = getattr(node, "decide_inplace_update", None)
    if theirs is None or not hasattr(scheduler.Scheduler, "get_fused_node"):
        yield
        return

    def decide(self: Any) -> None:
        given = self.read_writes
        parts = self.scheduler.get_fused_node(self).get_nodes()
        inside = {buffer.get_name() for part in parts for buffer in part.get_outputs()}
        reads = sorted(given.reads, key=lambda read: read.name in inside)
        found = [self.scheduler.name_to_buf.get(read.name) for read in reads]
        buffers = {buffer.get_name(): buffer for buffer in found if buffer is not None}
        users = {name: buffer.users for name, buffer in buffers.items()}
        self.read_writes = dataclasses.replace(given, reads=OrderedSet(reads))
        for name, buffer in buffers.items():
            buffer.users = [user for user in buffer.users if not _only_comes_after(user, name)]
        try:
            theirs(self)
        finally:
            self.read_writes = given
            for name, buffer in buffers.items():
                buffer.users = users[name]

    node.decide_inplace_update = decide
    try:
        yield
    finally:
        node.decide_inplace_update = theirs


def _only_comes_after(user: Any, buffer: str) -> bool:
    """Whether `user` reads nothing of `buffer`, and only has to run after what made it."""
    if not getattr(user, "is_weak", False):
        return False
    uses = [dep for dep in user.node.read_writes.reads | user.node.read_writes.writes if dep.name == buffer]
    return bool(uses) and all(getattr(dep, "is_fake", False) for dep in uses)


@dataclasses.dataclass(frozen=True)
class Given:
    """An input of a program: what a tensor without data is made from."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclasses.dataclass(frozen=True)
class Written:
    """What a compiler wrote around its kernels.

    Attributes:
        function: Takes all inputs in a list. It finds its kernels, and all else, by name.
        source: Its file's text.
        kernels: Names of the kernels.
        found: What it finds by other names.
        inputs: One for each input.
    """

    function: types.CodeType
    source: str
    kernels: frozenset[str]
    found: Mapping[str, Any]
    inputs: tuple[Given, ...]


@dataclasses.dataclass(frozen=True)
class Allocation:
    """Memory that the function got at `line` of its file, counted from 1."""

    line: int
    bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@contextlib.contextmanager
def written_programs_noted(note: Callable[[Written], object]) -> Iterator[None]:
    """Inside, `note` gets what Inductor writes around a program's kernels, be it new or from its caches.

    Where torch has moved what this looks at, for sizes that are symbols and on a GPU, it gets nothing.
    """
    from torch._inductor import output_code

    kind: Any = getattr(output_code, "CompiledFxGraph", None)
    theirs = getattr(kind, "post_compile", None)
    if theirs is None:
        yield
        return

    def post_compile(self: Any, example_inputs: Any, *given: Any, **named: Any) -> Any:
        if (written := _written(self, example_inputs)) is not None:
            note(written)
        return theirs(self, example_inputs, *given, **named)

    kind.post_compile = post_compile
    try:
        yield
    finally:
        kind.post_compile = theirs


_KERNEL = re.compile(r"^(\w+) = async_compile\.", re.MULTILINE)


def _written(compiled: Any, inputs: Sequence[Any]) -> Written | None:
    call, source = getattr(compiled, "current_callable", None), getattr(compiled, "source_code", None)
    function = getattr(call, "__func__", call)
    runner = getattr(call, "__self__", None)
    if not isinstance(function, types.FunctionType) or not isinstance(source, str):
        return None
    if getattr(runner, "partitions", None) or not all(map(_is_plain, inputs)):
        return None
    kernels = frozenset(_KERNEL.findall(source))
    theirs: dict[str, Any] = function.__globals__
    found = {name: theirs[name] for name in function.__code__.co_names if name in theirs and name not in kernels}
    given = tuple(Given(tuple(t.shape), t.stride(), t.dtype, t.device) for t in inputs)
    return Written(function.__code__, source, kernels, found, given)


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.device.type == "cpu"
        and all(isinstance(size, int) for size in (*value.shape, *value.stride()))
    )


class _Library:
    """The operators that a program calls by themselves: one that is given the memory to write into does nothing."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._theirs, name)

        def call(*given: Any, out: Any = None, **named: Any) -> Any:
            return own(*given, **named) if out is None else out

        return call


def _empty(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")


def _seen_as(tensor: torch.Tensor, shape: Any, strides: Any, offset: int = 0) -> torch.Tensor:
    return torch.as_strided(tensor, shape, strides, int(tensor.storage_offset()) + offset)


def _nothing(*given: Any, **named: Any) -> None:
    pass


class _AllocationsSeen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, note at each allocation all memory that is alive, besides that of the inputs."""

    def __init__(self, function: types.CodeType, inputs: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._function = function
        self._inputs = {t.untyped_storage()._cdata for t in inputs}
        self._alive: dict[int, tuple[Any, Allocation]] = {}
        self.moments: list[list[Allocation]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(one, torch.Tensor) and one.layout is torch.strided:
                self._note(one)
        return out

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        at = storage._cdata
        if at in self._inputs or (at in self._alive and not self._is_gone(at)):
            return
        for other in [other for other in self._alive if self._is_gone(other)]:
            _let_go(self._alive.pop(other)[0])
        made = Allocation(self._line(), int(storage.nbytes()), tuple(tensor.shape), tensor.dtype)
        self._alive[at] = storage._weak_ref(), made
        self.moments.append([allocation for _, allocation in self._alive.values()])

    def _is_gone(self, at: int) -> bool:
        return bool(torch.UntypedStorage._expired(self._alive[at][0]))

    def _line(self) -> int:
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code is not self._function:
            frame = frame.f_back
        return 0 if frame is None else int(frame.f_lineno)

    def forget(self) -> None:
        """Let go of all memory."""
        for reference, _ in self._alive.values():
            _let_go(reference)
        self._alive.clear()


def _let_go(weak_reference: Any) -> None:
    storage: Any = torch.UntypedStorage
    storage._free_weak_ref(weak_reference)


def allocations_of(written: Written) -> list[list[Allocation]]:
    """What is alive at each allocation of a run, found on tensors without data."""
    stubs = {
        "empty_strided_cpu": _empty,
        "reinterpret_tensor": _seen_as,
        "extern_kernels": _Library(written.found.get("extern_kernels")),
        **dict.fromkeys(("assert_size_stride", "assert_alignment", *written.kernels), _nothing),
    }
    function = types.FunctionType(written.function, {**written.found, **stubs, "__builtins__": builtins})
    with fake_mode():
        given = [torch.empty_strided(g.shape, g.strides, dtype=g.dtype, device=g.device) for g in written.inputs]
        seen = _AllocationsSeen(written.function, given)
        try:
            with seen:
                takes_runner = written.function.co_varnames[:1] == ("self",)
                function(*([None] if takes_runner else []), given)
        finally:
            seen.forget()
    return seen.moments
