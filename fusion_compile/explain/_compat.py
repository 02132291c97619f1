"""Private torch API through which `explain` observes torch. Feature probes, never a version compare."""

from __future__ import annotations

import contextlib
import logging
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
from torch import nn

from fusion_compile.passes._user_frame import is_outside_torch

TRACE_LOG = "torch.__trace"
"""Torch's structured trace: every record has ``metadata`` (a dict) and ``payload`` (text or None)."""
FUSION_LOGS = ("torch._inductor.scheduler.__fusion",)
CUDA_GRAPH_LOGS = (
    *(f"torch._inductor.{room}.__cudagraphs" for room in ("cudagraph_utils", "cudagraph_trees", "scheduler")),
    "fusion_compile._program.cuda_graph",
)


def import_inductor() -> None:
    """Import the modules of Inductor that log. On import they reset their loggers, which would undo our settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own decorators warn
        import torch._inductor.compile_fx
        import torch._inductor.cudagraph_trees
        import torch._inductor.cudagraph_utils
        import torch._inductor.scheduler  # noqa: F401


def inductor_decompositions() -> Any:
    """Return Inductor's table of operators that it splits into those that it fuses."""
    from torch._inductor.decomposition import select_decomp_table

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own decorators warn
        return select_decomp_table()


def replace_attention(module: torch.fx.GraphModule) -> None:
    """Replace products and a softmax that are attention by the attention operator, as Inductor does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes

        joint_graph_passes(module)


def cuda_graph_skips() -> int:
    """Return how often Inductor has given up CUDA graphs in this process."""
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def fx_names(operation: str) -> tuple[str, ...]:
    """Return the FX nodes that a scheduler node ``op3`` or ``op3_op4`` computes; empty unless Inductor schedules."""
    from torch._inductor.virtualized import V

    operations = getattr(V.graph, "name_to_op", None) or {}
    found = [operations[part] for part in operation.split("_") if part in operations]
    return tuple(dict.fromkeys(str(node.name) for op in found for node in op.get_origins()))


@contextlib.contextmanager
def inductor_tells() -> Iterator[None]:
    """Let Inductor record which kernel comes from which node."""
    from torch._inductor import config

    options = {"trace.provenance_tracking_level": 1}
    with config.patch({k: v for k, v in options.items() if k in config.get_config_copy()}):
        yield


@contextlib.contextmanager
def caches_aside() -> Iterator[None]:
    """Neither read nor write the caches of compiled graphs, and forget which shapes Dynamo has seen change.

    Afterwards what Dynamo learned inside is forgotten and what it knew before is back.
    """
    from torch._dynamo import pgo
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    seen = {k: getattr(pgo, k) for k in ("_CODE_STATE", "_INIT_CODE_STATE") if hasattr(pgo, k)}
    try:
        for name in seen:
            setattr(pgo, name, None)
        with (
            config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
            functorch_config.patch(enable_autograd_cache=False),
            torch._dynamo.config.patch(automatic_dynamic_local_pgo=False),
        ):
            yield
    finally:
        for name, value in seen.items():
            setattr(pgo, name, value)


@contextlib.contextmanager
def dynamo_is_quiet() -> Iterator[None]:
    """Inside, Dynamo's log is silent about graph breaks, which the findings tell. Whoever asked for its log gets it."""
    log = logging.getLogger("torch._dynamo")
    before = log.level
    if before in (logging.NOTSET, logging.WARNING):
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def is_compiled(fn: Any) -> bool:
    """Whether torch.compile returned `fn`, or `fn` is a module on which ``compile()`` was called."""
    return (
        isinstance(fn, torch._dynamo.OptimizedModule)
        or hasattr(fn, "_torchdynamo_orig_callable")
        or getattr(fn, "_compiled_call_impl", None) is not None
    )


def uncompiled(fn: Any) -> Any:
    """Return the callable that was given to torch.compile, if `fn` is its result; else `fn`."""
    return getattr(fn, "_torchdynamo_orig_callable", None) or getattr(fn, "_orig_mod", None) or fn


def is_marked_static(node: torch.fx.Node) -> bool:
    """Whether the tensor behind an input of a Dynamo graph is marked to keep its address. Parameters and buffers of
    modules are."""
    value = node.meta.get("example_value")
    facts = node.meta.get("tensor_dict") or {}
    return bool(facts.get("_dynamo_static_input_type") or getattr(value, "_dynamo_static_input_type", None))


def is_static(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is marked to keep its address. Dynamo marks what it reaches through a module."""
    return getattr(tensor, "_dynamo_static_input_type", None) is not None


def forget_static(tensor: torch.Tensor) -> None:
    """Remove the mark from `tensor`."""
    if hasattr(tensor, "_dynamo_static_input_type"):
        del tensor._dynamo_static_input_type


def numpy_call(node: torch.fx.Node) -> str:
    """Return the name of the numpy function that a node of a Dynamo graph computes (``"sin"``); "" for other nodes."""
    kind = type(node.target).__name__
    if node.op != "call_function" or not (kind.startswith("numpy_") and kind.endswith("_wrapper")):
        return ""
    return str(getattr(node.target, "__name__", "")).removeprefix("wrapped_").removeprefix("wrapped_")


def is_numpy_array(node: torch.fx.Node) -> bool:
    """Whether an input of a Dynamo graph was a numpy array in the program."""
    return type(getattr(node, "_dynamo_source", None)).__name__ == "NumpyTensorSource"


def recomputes_untagged_backwards() -> bool:
    """Whether torch finds the backward in a graph by itself and recomputes checkpointed activations there.

    Torch 2.11 does not: it needs a tag, and without one it ignores checkpointing.
    """
    return hasattr(torch.fx.traceback, "_mark_autograd_backward")


def may_be_called_bare(module: nn.Module) -> bool:
    """Whether ``module(…)`` only calls ``module.forward(…)``, and Dynamo traces the frame of that method."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    method = module.forward
    return (
        isinstance(method, types.MethodType)
        and isinstance(method.__func__, types.FunctionType)
        and not any(getattr(module, name, None) for name in hooks)
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
        and is_outside_torch(method.__func__.__code__.co_filename)
    )


def forget_compiled(fn: Any) -> None:
    """Let the compiled `fn` compile again at its next call. Other compiled functions stay compiled."""
    for code in _codes(fn):
        torch._dynamo.eval_frame.remove_from_cache(code)


def _codes(fn: Any, depth: int = 0) -> Iterator[types.CodeType]:
    if fn is None or depth > 4:
        return
    fn = getattr(fn, "__func__", fn)
    if isinstance(getattr(fn, "__code__", None), types.CodeType):
        yield fn.__code__
    for name in ("_torchdynamo_orig_callable", "_orig_mod"):
        yield from _codes(getattr(fn, name, None), depth + 1)
    if isinstance(fn, nn.Module):
        yield from _codes(fn.forward, depth + 1)


def own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a Python function or method with its own code object; return other callables unchanged.

    Dynamo caches by code object, so it compiles the copy again.
    """
    if isinstance(fn, types.MethodType):
        return types.MethodType(own_code(fn.__func__), fn.__self__)
    if not isinstance(fn, types.FunctionType):
        return fn
    copy = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


def unsupported_inside(error: BaseException | None) -> BaseException | None:
    """Return Dynamo's refusal to make one graph among `error` and its causes, or None."""
    while error is not None and not isinstance(error, torch._dynamo.exc.Unsupported):
        error = error.__cause__
    return error


def user_frames(error: BaseException) -> list[Any]:
    """Return the frames of the traced program at which Dynamo gave up, outermost first; empty if unknown."""
    return list(getattr(error, "real_stack", None) or [])
