"""Private API of Inductor: how it compiles sums over repeated indices."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def sums_in_one_order() -> Iterator[None]:
    """Inside, Inductor compiles sums over repeated indices so that two runs add in the same order.

    Such sums are the gradients of an embedding and of ``table[index]``. Inductor adds with atomic operations, in the
    order in which threads happen to arrive, and the last bits differ from run to run. Here, on a CPU, torch's own
    operator sums up an embedding, in the order of the indices whatever the number of threads, and another loop that
    adds to places that it computes runs on one thread. On a GPU torch's own operator, which sorts the indices, does
    both. What scatters (``scatter_add``, ``index_add_``) is left to torch. Where torch has moved what this replaces,
    nothing happens.
    """
    from torch._inductor import decomposition, lowering
    from torch._inductor.codegen import cpp

    replaced = [
        (decomposition, ("decompositions", "fast_random_decomps")),
        (lowering, ("index_put_impl_", "make_fallback", "needs_fallback_due_to_atomic_add_limitations")),
        (cpp, ("CppKernelProxy", "LoopNest", "OuterLoopFusedKernel", "ParallelDepth")),
    ]
    with contextlib.ExitStack() as put_back:
        if all(hasattr(module, name) for module, names in replaced for name in names):
            put_back.enter_context(_embeddings_summed_by_torch(decomposition, lowering))
            put_back.enter_context(_index_put_by_torch_on_gpus(lowering))
            put_back.enter_context(_computed_places_on_one_thread(cpp))
        yield


@contextlib.contextmanager
def _embeddings_summed_by_torch(decomposition: Any, lowering: Any) -> Iterator[None]:
    """Leave ``embedding_dense_backward`` whole on a CPU. A GPU's cannot be recorded in a CUDA graph: it reads how many
    indices are different."""
    operator = torch.ops.aten.embedding_dense_backward.default
    tables = [decomposition.decompositions, decomposition.fast_random_decomps()]
    theirs = [table.get(operator) for table in tables]
    if not all(theirs):
        yield
        return
    if operator not in lowering.lowerings:
        lowering.make_fallback(operator, warn=False, override_decomp=True)

    def whole(gradient: Tensor, indices: Tensor, rows: int, padding: int, by_frequency: bool) -> Any:
        if gradient.device.type != "cpu":
            return theirs[0](gradient, indices, rows, padding, by_frequency)
        if gradient.dtype in (torch.float32, torch.float64):
            return NotImplemented
        # The operator would add in the lower precision; a sum over many indices then loses them.
        wide = operator(gradient.to(torch.float32), indices, rows, padding, by_frequency)
        return wide.to(gradient.dtype)

    for table in tables:
        table[operator] = whole
    try:
        yield
    finally:
        for table, their in zip(tables, theirs, strict=True):
            table[operator] = their


@contextlib.contextmanager
def _index_put_by_torch_on_gpus(lowering: Any) -> Iterator[None]:
    theirs, adds_apart = lowering.index_put_impl_, lowering.needs_fallback_due_to_atomic_add_limitations

    def index_put(table: Any, indices: Any, values: Any, accumulate: bool, *given: Any, **named: Any) -> Any:
        if not accumulate or table.get_device().type == "cpu" or not table.get_dtype().is_floating_point:
            return theirs(table, indices, values, accumulate, *given, **named)
        lowering.needs_fallback_due_to_atomic_add_limitations = lambda dtype: True
        try:
            return theirs(table, indices, values, accumulate, *given, **named)
        finally:
            lowering.needs_fallback_due_to_atomic_add_limitations = adds_apart

    lowering.index_put_impl_ = index_put
    try:
        yield
    finally:
        lowering.index_put_impl_ = theirs


@contextlib.contextmanager
def _computed_places_on_one_thread(cpp: Any) -> Iterator[None]:
    theirs, generate = cpp.LoopNest.max_parallel_depth, cpp.CppKernelProxy.codegen_nodes
    adding: list[Any] = []  # compared by identity: kernels have no equality of their own that could be trusted

    def codegen_nodes(kernel: Any, nodes: Any) -> Any:
        if any(getattr(dep, "mode", None) == "atomic_add" for node in nodes for dep in node.read_writes.writes):
            adding.append(kernel)
        return generate(kernel, nodes)

    def max_parallel_depth(nest: Any) -> Any:
        inner = nest.kernel.inner if isinstance(nest.kernel, cpp.OuterLoopFusedKernel) else ()
        kernels = [nest.kernel, *(each.kernel for each in inner)]
        if any(one is kernel for one in adding for kernel in kernels):
            return cpp.ParallelDepth(parallel_depth=0, start_depth=0)
        return theirs(nest)

    cpp.CppKernelProxy.codegen_nodes, cpp.LoopNest.max_parallel_depth = codegen_nodes, max_parallel_depth
    try:
        yield
    finally:
        cpp.CppKernelProxy.codegen_nodes, cpp.LoopNest.max_parallel_depth = generate, theirs
