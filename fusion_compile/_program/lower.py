"""A Python callable over tensors -> a compiled callable. The only caller of ``torch.compile``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion_compile import _compat
from fusion_compile._program import compilers_warnings
from fusion_compile._program._compat import (
    inductor_orders,
    inductor_rewrites,
    numbers_apart_from_sums,
    products_written_into_concatenations,
    small_kernels_together,
    why_no_kernels,
)
from fusion_compile._program.casts import merge_casts
from fusion_compile._program.gathers import gather_late, has_gathers
from fusion_compile._program.kernel_sources._compat import kernels_compiled_together
from fusion_compile._program.memory._compat import (
    written_over_what_is_read_for_the_last_time,
    written_programs_noted,
)
from fusion_compile._program.memory.activations import compute_again, share_kept, waits_in_the_backward
from fusion_compile._program.memory.schedule import note
from fusion_compile._program.numbers_once import numbers_once
from fusion_compile._program.recomputation import checkpoints, recomputes
from fusion_compile._program.saved._compat import kept_in_caches
from fusion_compile._program.sums._compat import sums_in_one_order

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "eager")


def resolve_mode(mode: str | None, device: torch.device, backend: str = "") -> str:
    """Resolve ``None`` to ``"max-autotune"`` on CUDA and ``"default"`` elsewhere, and refuse an unknown name; and, for
    Inductor's `backend`, a GPU that it cannot write kernels for."""
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; use one of {', '.join(map(repr, MODES))}, or None.")
    mode = mode or ("max-autotune" if device.type == "cuda" else "default")
    if device.type == "cuda" and mode != "eager" and backend == "inductor" and (reason := why_no_kernels()):
        raise RuntimeError(f"mode={mode!r} on {device}: {reason}")
    return mode


def without_cuda_graph(mode: str) -> str:
    """The mode that compiles as `mode` does but records no CUDA graph, for programs that rarely run."""
    return {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}.get(mode, mode)


def lower(
    fn: Callable[..., Any],
    *,
    mode: str,
    backend: str = "inductor",
    on_graph: _compat.GraphObserver | None = None,
    beside: Callable[[torch.fx.GraphModule, Callable[..., Any]], Callable[..., Any]] | None = None,
    dynamic: bool = False,
) -> Callable[..., Any]:
    """Compile `fn` as one full graph with static shapes; ``mode="eager"`` gives `fn` back.

    With `dynamic` and `on_graph` the sizes that ``_compat.mark_symbolic`` marked are symbols, and no other is.

    `backend`: a torch.compile backend's name; `mode` counts for ``"inductor"`` only. `on_graph` is called with each
    captured FX graph and its inputs before the backend compiles it, and may raise to refuse it. `beside`, with
    `on_graph`: from a copy of the graph and the compiled function to what runs in its place.
    """
    if mode == "eager":
        return fn
    if on_graph is not None:
        return torch.compile(
            fn,
            fullgraph=True,
            dynamic=None if dynamic else False,
            backend=_compat.observed_backend(
                backend, mode, on_graph, partial(inductor_as_told, backend=backend), beside
            ),
        )
    if backend != "inductor":
        return torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)
    return torch.compile(fn, fullgraph=True, dynamic=False, mode=None if mode == "default" else mode)


def lower_graph(
    graph: torch.fx.GraphModule, inputs: Sequence[Tensor], *, mode: str, backend: str = "inductor"
) -> Callable[..., Any]:
    """Compile a graph in ATen operators for `inputs` of these shapes; ``mode="eager"`` gives `graph` back. Fake tensors
    of the trace stand for inputs where sizes are symbols.

    Inputs that are marked static keep their addresses, so that a CUDA graph updates them in place. What checkpointing
    computes again waits for the gradient.
    What `lower` does behind Dynamo: no Python is read, and nothing is guarded.
    """
    if mode == "eager":
        return graph
    _compat.hand_on_static_inputs(graph)
    quiet = compilers_warnings.are_no_errors()
    told = inductor_as_told(graph, backend)
    # With a trace around it, another backend would leave out random draws that nothing uses, and has no cache. Where
    # sizes are symbols, the caches would have to ask for the trace's assumptions, and the caller does.
    known = backend == "inductor" and not any(isinstance(n, torch.SymInt) for tensor in inputs for n in tensor.shape)
    kept = kept_in_caches(inputs) if known else contextlib.nullcontext([*inputs])
    with torch.no_grad(), quiet, _compat.shapes_as_the_kernels_have_them(), kept as given, told:
        compiled: Callable[..., Any] = _compat.backend_for(backend, mode)(graph, given)
    return compiled


@contextlib.contextmanager
def inductor_as_told(graph: torch.fx.GraphModule, backend: str = "inductor") -> Iterator[None]:
    """Inside, Inductor writes gradients straight into their banks, casts each weight once and computes a CPU's numbers
    once, what the checkpoints of `graph` compute again waits for the gradient, sums over repeated indices have one
    order, results are written over what is read for the last time, a CPU's kernels are compiled together, a GPU's small
    ones are launched together, and none is written that its compiler fails on."""
    if backend != "inductor":
        yield
        return
    with contextlib.ExitStack() as told:
        if has_gathers(graph.graph):
            told.enter_context(inductor_rewrites(gather_late))
        told.enter_context(products_written_into_concatenations())
        told.enter_context(inductor_rewrites(merge_casts))
        told.enter_context(inductor_rewrites(numbers_once))
        told.enter_context(numbers_apart_from_sums())
        told.enter_context(small_kernels_together(graph))
        told.enter_context(sums_in_one_order())
        told.enter_context(kernels_compiled_together())
        told.enter_context(written_over_what_is_read_for_the_last_time())
        told.enter_context(written_programs_noted(note))
        if (share := share_kept()) is not None:
            told.enter_context(inductor_rewrites(partial(compute_again, budget=share), f"keeps {share}"))
        if share is not None or recomputes(graph.graph) or checkpoints(graph.graph):
            told.enter_context(inductor_orders(waits_in_the_backward))
        yield


class NoLongerFits(RuntimeError):
    """What a compiled program assumed does not hold any more; nothing has run."""


@contextlib.contextmanager
def no_recompile() -> Iterator[None]:
    """Inside, a compiled function whose assumptions no longer hold raises NoLongerFits naming them, before it runs."""
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    except RuntimeError as error:
        if "fail_on_recompile" not in str(error):
            raise
        lines = [line.lstrip() for line in str(error).splitlines()]
        reasons = [line.partition(": ")[2].strip() for line in lines if line.startswith("- ")]
        reasons = [reason for reason in reasons if reason]
        if not reasons:
            # torch names a guard for every program that it still has, so it has none any more.
            raise RuntimeError(
                "torch no longer has the compiled program: it was dropped (torch.compiler.reset(), "
                "torch._dynamo.reset()), or an object that it was compiled for is gone. Compile it again: "
                "call compile_training_step(), as_torch_optimizer() or optimize_sampler() anew."
            ) from None
        raise NoLongerFits(
            f"the compiled program no longer fits what surrounds it ({'; '.join(reasons)}). Call it as it was called "
            f"at first (autocast, train/eval of every submodule, frozen parameters and buffers unchanged), or "
            f"compile it again; a training step's recapture() does, and keeps all state."
        ) from None
