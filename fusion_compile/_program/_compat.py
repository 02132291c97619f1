"""Private API of Inductor: in which order it runs the nodes of a graph, where products go, what it fuses and launches
together."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from fusion_compile._program.launched_together import launched_together

_ORDER = "torch._inductor.fx_passes.control_dependencies"
_WHAT_TELLS = tuple(sorted(str(file) for file in Path(__file__).parent.rglob("_compat.py")))
"""The files that change what Inductor writes: a program that it wrote before they changed is no program of today's."""

Order = Callable[[fx.Graph], Mapping[fx.Node, fx.Node]]
"""From a graph as Inductor will schedule it to pairs of nodes: the first runs after the second."""


@contextlib.contextmanager
def inductor_orders(order: Order) -> Iterator[None]:
    """Inside, Inductor schedules and fuses no node before the one that `order` puts it after.

    A pass that users gave Inductor (``post_grad_custom_post_pass``) runs before. Where torch has no such dependencies,
    nothing happens.
    """
    if importlib.util.find_spec(_ORDER) is None:
        yield
        return
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    preserve = importlib.import_module(_ORDER).preserve_node_ordering
    given: Any = config.post_grad_custom_post_pass
    users = given if isinstance(given, tuple) else () if given is None else (given,)

    class Ordered(CustomGraphPass):  # type: ignore[misc, unused-ignore]
        def __call__(self, graph: fx.Graph) -> None:
            for theirs in users:
                theirs(graph)
            preserve(graph, {node: [after] for node, after in order(graph).items()})

        def uuid(self) -> Any:
            # None, which a user's plain function gives, bypasses the cache.
            theirs = [getattr(user, "uuid", lambda: None)() for user in users]
            return None if None in theirs else (*theirs, get_hash_for_files((*_WHAT_TELLS, inspect.getfile(order))))

    with config.patch(post_grad_custom_post_pass=Ordered()):
        yield


@contextlib.contextmanager
def inductor_rewrites(change: Callable[[fx.Graph], object], said: str = "") -> Iterator[None]:
    """Inside, `change` rewrites every graph that Inductor compiles, as it is in ATen operators, before its own passes.

    `said`: what `change` was told, which makes it another one. A pass that users gave Inductor
    (``post_grad_custom_pre_pass``) runs before.
    """
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    given: Any = config.post_grad_custom_pre_pass
    users = given if isinstance(given, tuple) else () if given is None else (given,)
    file = inspect.getfile(getattr(change, "func", change))

    class Rewritten(CustomGraphPass):  # type: ignore[misc, unused-ignore]
        def __call__(self, graph: fx.Graph) -> None:
            for theirs in users:
                theirs(graph)
            change(graph)

        def uuid(self) -> Any:
            theirs = [getattr(user, "uuid", lambda: None)() for user in users]
            return None if None in theirs else (*theirs, said, get_hash_for_files((*_WHAT_TELLS, file)))

    with config.patch(post_grad_custom_pre_pass=Rewritten()):
        yield


def is_higher_order(node: fx.Node) -> bool:
    """Whether `node` calls an operator that has graphs of its own (a branch, a scan, flexible attention)."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def boxed(compiled: Callable[..., Any]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """What `lower_graph` gives as a function of a list, which it empties.

    AOTAutograd makes such a function and hides it behind one of positional arguments, whose caller holds every input
    until the end. Where torch has moved it, the list is emptied before the call.
    """
    inner: Any = compiled
    while "aot_module_simplified" in getattr(inner, "__qualname__", ""):
        inner = getattr(inner, "__wrapped__", None)
    if inner is not compiled and getattr(inner, "_boxed_call", False):
        found: Callable[[list[Any]], Sequence[Tensor]] = inner
        return found

    def run(given: list[Any]) -> Sequence[Tensor]:
        arguments = tuple(given)
        given.clear()
        result: Sequence[Tensor] = compiled(*arguments)
        return result

    return run


@contextlib.contextmanager
def numbers_in_tensors_are_tensors() -> Iterator[None]:
    """Inside, a trace takes no 0-dim float64 tensor on a CPU for a Python number.

    torch 2.13 does, and guards that it is not nan: a step whose gradient is nan, in a model of float64, would be the
    last one. Where torch has moved what decides it, nothing happens.
    """
    fakes = sys.modules["torch._subclasses.fake_tensor"]
    theirs = getattr(fakes, "_is_plain_tensor", None)
    if theirs is None:
        yield
        return

    def is_plain(t: object) -> bool:
        return bool(theirs(t)) and not (isinstance(t, Tensor) and t.dtype == torch.float64)

    fakes._is_plain_tensor = is_plain  # type: ignore[attr-defined]
    try:
        yield
    finally:
        fakes._is_plain_tensor = theirs  # type: ignore[attr-defined]


@contextlib.contextmanager
def random_numbers_are_torchs() -> Iterator[None]:
    """Inside, Inductor compiles programs that draw the random numbers that torch's own operators draw."""
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield


@contextlib.contextmanager
def products_written_into_concatenations() -> Iterator[None]:
    """Inside, Inductor writes a matrix product that is a part of a concatenation straight into its slice.

    It does so for what its own kernels compute. A product has its layout fixed where it is autotuned, or is seen as a
    vector, as each weight's gradient in a flat bank; torch then copies it, with a launch for each. A product can be
    written anywhere: the library's kernels take the tensor to write into. Where torch has moved what this replaces,
    nothing happens.
    """
    from torch._inductor import ir

    names = ("ConcatKernel", "ExternKernelOut", "FixedLayout", "FlexibleLayout", "NonOwningLayout", "ReinterpretView")
    if not all(hasattr(ir, name) for name in names) or "realize_into" not in vars(ir.ConcatKernel):
        yield
        return
    theirs = vars(ir.ConcatKernel)["realize_into"]

    def realize_into(cls: Any, src: Any, dst: Any) -> Any:
        placed = _place_of(ir, src, dst)
        if placed is None:
            return theirs.__func__(cls, src, dst)
        product, view = placed
        product.layout = ir.NonOwningLayout(view)
        return product

    kernel: Any = ir.ConcatKernel
    kernel.realize_into = classmethod(realize_into)
    try:
        yield
    finally:
        kernel.realize_into = theirs


def _place_of(ir: Any, src: Any, dst: Any) -> tuple[Any, Any] | None:
    """The product behind `src` and its place in the slice `dst`, in the product's shape; None for anything else."""
    if isinstance(src, ir.TensorBox):
        src = src.data
    seen: Any = src.layout if isinstance(src, ir.ReinterpretView) else None
    box: Any = src if seen is None else src.data
    product: Any = box.data if isinstance(box, ir.StorageBox) else None
    if type(product) is not ir.ExternKernelOut or type(product.layout) not in (ir.FixedLayout, ir.FlexibleLayout):
        return None
    if not isinstance(dst, ir.ReinterpretView):
        if not ir.is_storage_and_layout(dst):
            return None
        storage, layout = ir.as_storage_and_layout(dst)
        dst = ir.ReinterpretView(data=storage, layout=layout)
    slot: Any = dst
    own, there = product.layout, slot.layout
    layouts = [own, there] if seen is None else [own, seen, there]
    if not all(layout.is_contiguous() and math.prod(layout.size) == math.prod(own.size) for layout in layouts):
        return None
    if (
        own.dtype != there.dtype
        or any(layout.offset != 0 for layout in layouts[:-1])
        or not _only_concatenated(product)
    ):
        return None
    strides = ir.FlexibleLayout.contiguous_strides(own.size)
    place = ir.FixedLayout(own.device, own.dtype, list(own.size), strides, there.offset)
    return product, ir.ReinterpretView(data=slot.data, layout=place)


def _only_concatenated(product: Any) -> bool:
    """Whether nothing reads `product` besides the concatenation that is being lowered: the whole may be overwritten
    while another reader waits."""
    from torch._inductor.virtualized import V

    made, reader = getattr(product, "origin_node", None), getattr(V.graph, "current_node", None)

    def leads_there_alone(node: fx.Node) -> bool:
        return all(
            user is reader or (getattr(user.target, "is_view", False) and leads_there_alone(user))
            for user in node.users
        )

    return isinstance(made, fx.Node) and isinstance(reader, fx.Node) and leads_there_alone(made)


_TRITONS_THAT_FAIL = ("3.7.",)
"""Tritons that cannot compile some sums over everything with computations on single numbers behind them. 3.6 can, and
so can 3.8 and 3.9; torch 2.13 pins 3.7.1."""


@contextlib.contextmanager
def numbers_apart_from_sums() -> Iterator[None]:
    """Inside, Inductor writes no kernel for a GPU that sums up everything and stores several numbers that follow.

    Triton 3.7 cannot compile such a kernel where a number that follows from the sum is stored and also decides what
    else is stored ("operand #0 does not dominate this use"), as a gradient's norm over several banks or a running mean
    of the loss. Which form fails depends on the shapes, on the number of banks and on the user's loss. So the kernel of
    a sum stores the sum and one number that follows, and the others are computed apart from it, together: computations
    on single numbers are fused with each other, which torch thinks too small to be worth it. With another Triton,
    and where torch has moved what this replaces, nothing happens.
    """
    from torch._inductor import config, scheduler

    if not hasattr(scheduler.Scheduler, "can_fuse") or not _this_triton_fails():
        yield
        return
    theirs = scheduler.Scheduler.can_fuse

    def can_fuse(self: Any, node1: Any, node2: Any, *given: Any, **named: Any) -> bool:
        nodes = [*node1.get_nodes(), *node2.get_nodes()]
        if _goes_on_from_a_sum(nodes):
            return False
        least = 1 if _all_on_numbers(nodes) else config.score_fusion_memory_threshold
        with config.patch(score_fusion_memory_threshold=least):
            return bool(theirs(self, node1, node2, *given, **named))

    replaced: Any = scheduler.Scheduler
    replaced.can_fuse = can_fuse
    try:
        yield
    finally:
        replaced.can_fuse = theirs


def _this_triton_fails() -> bool:
    return _triton().startswith(_TRITONS_THAT_FAIL)


def _triton() -> str:
    """Triton's version; "" where there is none. torch's own builds of it have other names."""
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def why_no_kernels() -> str:
    """Why Inductor could write no kernels for a GPU, or some that do not compile, with the remedy; "" if it can. torch
    would say so after minutes of tracing."""
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed, which turns a program's kernels into a GPU's code; install the version that "
            "torch pins (pip install triton==3.7.1 for torch 2.13), or use mode='eager'."
        )
    from torch._inductor import scheduler

    if _this_triton_fails() and not hasattr(scheduler.Scheduler, "can_fuse"):
        return (
            f"Triton {_triton()} cannot compile some kernels that sum up everything and go on with the sum, as a "
            f"gradient's norm, and torch {torch.__version__} has moved what keeps such kernels from being written; "
            f"install Triton 3.6, or 3.8 or newer, as this torch takes, or use mode='eager'."
        )
    return ""


def _goes_on_from_a_sum(nodes: Sequence[Any]) -> bool:
    """Whether these nodes of a GPU's program reduce something to one number, and compute several others from it."""
    groups: list[Any] = [getattr(node, "group", None) for node in nodes]
    if any(group is None or group[0].type == "cpu" for group in groups):
        return False
    of_one = [node for node, (_, (size, *_)) in zip(nodes, groups, strict=True) if size == 1]
    sums = [node for node in of_one if node.is_reduction()]
    names = {name for node in sums for name in node.get_operation_names()}
    following = [node for node in of_one if not node.is_reduction() and names & set(node.ancestors)]
    return len(following) > 1


def _all_on_numbers(nodes: Sequence[Any]) -> bool:
    """Whether each of these nodes of a GPU's program computes one number from others."""
    groups: list[Any] = [getattr(node, "group", None) for node in nodes]
    return all(
        group is not None and group[0].type != "cpu" and group[1][0] == 1 and not node.is_reduction()
        for node, group in zip(nodes, groups, strict=True)
    )


_SMALL = 1 << 20
"""Bytes that a kernel reads and writes. An H100 moves them in a third of a microsecond, and a launch takes longer."""
_MOST_TOGETHER = 8
_LONG_SUM = 2048
"""Entries of a sum from which on Inductor launches it apart."""


@contextlib.contextmanager
def small_kernels_together(graph: fx.GraphModule) -> Iterator[None]:
    """Inside, Inductor launches small kernels of a GPU's program as one where neither waits for the other.

    An update computes the same few numbers for every bank: sums over rows, norms, roots, counts. Each is a kernel that
    the GPU finishes sooner than it could launch the next. Inductor can write several into one ("combo kernels"), each
    with the code that it has alone. By itself it would do so with large ones, too, and would find few that are ready at
    the same moment. The program's highest point of memory may not rise. Where torch has moved what this replaces, on a
    CPU, and where the user has switched combo kernels on, nothing happens.
    """
    from torch._inductor import config, scheduler
    from torch._inductor.codegen import triton

    options = {"combo_kernels": True, "combo_kernel_peak_memory_pct_threshold": 0.0}
    name = "group_algorithm_for_combo_kernels"
    kernel: Any = getattr(scheduler, "ForeachKernelSchedulerNode", None)
    needed = ((scheduler.Scheduler, "_get_unmet_dep_nodes"), (triton.TritonScheduling, "select_tiling"), (kernel, name))
    known = all(hasattr(owner, one) for owner, one in (*needed, *((config, option) for option in options)))
    if not known or not _on_gpu(graph) or config.combo_kernels:
        yield
        return
    theirs = inspect.getattr_static(kernel, name)
    setattr(kernel, name, staticmethod(_small_groups))
    try:
        with config.patch(options):
            yield
    finally:
        setattr(kernel, name, theirs)


def _on_gpu(graph: fx.GraphModule) -> bool:
    made = (n.meta.get("example_value", n.meta.get("val")) for n in graph.graph.find_nodes(op="placeholder"))
    return any(isinstance(t, Tensor) and t.device.type == "cuda" for t in made)


def _small_groups(scheduler: Any) -> list[list[Any]]:
    waits_for = {node: scheduler._get_unmet_dep_nodes(node) for node in scheduler.nodes}
    kinds = {node: _kind_of_small(scheduler, node) for node in scheduler.nodes}
    return launched_together(waits_for, kinds, _MOST_TOGETHER)


def _kind_of_small(scheduler: Any, node: Any) -> tuple[int, str, int] | None:
    """Inductor writes kernels of a kind into one: of one stream, all sums or none, with as many dimensions."""
    from torch._inductor import scheduler as of_inductor
    from torch._inductor.codegen import triton

    device = node.get_device()
    if (
        type(node) not in (of_inductor.SchedulerNode, of_inductor.FusedSchedulerNode)
        or node.is_template()
        or device is None
        or device.type != "cuda"
        or node.get_read_write_buffers_sizes() > _SMALL
    ):
        return None
    stream = getattr(scheduler, "node_to_stream", {}).get(node, 0)
    nodes = node.get_nodes()
    longest = max((int(part.group[1][1]) for part in nodes if part.is_reduction()), default=0)
    if longest:
        return stream, "long sum" if longest > _LONG_SUM else "sum", 2
    return stream, "entries", len(triton.TritonScheduling.select_tiling(nodes, *node.group[1]))
