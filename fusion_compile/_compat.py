"""All private torch API, behind feature probes. torch 2.11 to 2.15; never a version compare."""

from __future__ import annotations

import contextlib
import copy
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import sympy  # type: ignore[import-untyped]
import torch
import torch._dynamo
import torch._dynamo.source
import torch.distributed
import torch.distributions
import torch.utils.hooks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor

from fusion_compile.passes._user_frame import innermost

RefusedByCompiler: type[Exception] = torch._dynamo.exc.BackendCompilerFailed
UnsupportedByDynamo: tuple[type[Exception], ...] = (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError)
"""Errors with which Dynamo says that it cannot read a program."""
DATA_DEPENDENT: tuple[type[Exception], ...] = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of fake tensors at a read of a value on the CPU."""

GraphObserver = Callable[[torch.fx.GraphModule, list[Any]], None]


def fake_mode() -> Any:
    """A `FakeTensorMode` that accepts real tensors in closures (constants, frozen parameters)."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_of_a_trace(tensor: Tensor) -> bool:
    """Whether `tensor` is a stand-in without data, which means nothing once its trace is over."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) or torch._is_functional_tensor(tensor)


def size_expression(size: int | torch.SymInt) -> Any:
    """The sympy expression of a traced size: a number if tracing fixed it."""
    return sympy.Integer(size) if isinstance(size, int) else size.node.expr


class SizeAssumption(NamedTuple):
    """One assumption of a trace about symbolic sizes.

    `holds`: a sympy condition on the remaining symbols. `met`: the condition before symbols were replaced by numbers.
    `where`: ``"file:line"`` or "".
    """

    holds: Any
    met: Any
    where: str


def size_assumptions(sizes: Iterable[int | torch.SymInt]) -> list[SizeAssumption]:
    """All assumptions behind `sizes`. The trace holds for the numbers that satisfy every one."""
    env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    if env is None:
        return []
    met = [(guard.expr, _outside_torch(guard.sloc.framework_loc)) for guard in env.guards]
    for symbol, allowed in env.var_to_range.items():
        for condition, bound in ((sympy.Ge, allowed.lower), (sympy.Le, allowed.upper)):
            if isinstance(bound, sympy.Integer):
                met.append((condition(symbol, bound), ""))
    return [SizeAssumption(env.replace(condition), condition, where) for condition, where in met]


def _outside_torch(frame: Any) -> str:
    return innermost([(frame.filename, frame.lineno or 0)]) if isinstance(frame, traceback.FrameSummary) else ""


def holding(module: nn.Module, tensors: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Inside, `tensors` (by full name) are in the places of `module`'s parameters and buffers, tied ones too."""
    # Put back last in, first out: one module under two names is exchanged twice, and the second time finds the first.
    return torch.nn.utils.stateless._reparametrize_module(module, tensors, tie_weights=True, stack_weights=True)


@contextlib.contextmanager
def tracing_gradients() -> Iterator[None]:
    """Let Dynamo trace ``torch.autograd.grad`` into the graph. Only what `mark_symbolic` marked is symbolic."""
    with torch._dynamo.config.patch(trace_autograd_ops=True, automatic_dynamic_shapes=False):
        yield


def region(name: str) -> contextlib.AbstractContextManager[Any]:
    """Tag the nodes traced inside with ``meta["custom"]["region"]``.

    ``"backward"`` carries the tags by which torch finds the place to recompute checkpointed activations: torch 2.11
    needs ``remat_pass_tag`` and otherwise ignores checkpointing silently. Later versions look for ``phase``.
    """
    tags = {"region": name}
    if name == "backward":
        tags |= {"remat_pass_tag": "is_backward", "phase": "backward"}
    return torch.fx.traceback.annotate(tags)


def gradient_hooks(tensor: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """What ``tensor.register_hook`` registered, in order."""
    return list((getattr(tensor, "_backward_hooks", None) or {}).values())


def hooks_after_accumulation(tensor: Tensor) -> int:
    """How many hooks ``register_post_accumulate_grad_hook`` registered on `tensor`."""
    return len(getattr(tensor, "_post_accumulate_grad_hooks", None) or {})


def same_kinds(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Whether as many others, each an argument of its own, are one by one like `tensors`, in one pass of C.

    That is: of the same class, dtype, device, shape, strides and dispatch keys (sparse, conjugated, of inference mode),
    and as learnable. Autocast and other modes may make equal ones differ. No tensor is held. One tensor in two places
    is like nothing.
    """
    if (guards := getattr(torch._C._dynamo.guards, "TensorGuards", None)) is not None and tensors:
        check: Callable[..., bool] = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check
    kinds = [_kind_of(t) for t in tensors]
    return lambda *others: [_kind_of(t) for t in others] == kinds and len({*map(id, others)}) == len(kinds)


def _kind_of(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return type(t)
    strides = t.stride() if t.layout is torch.strided else ()
    keys = torch._C._dispatch_keys(t)
    return type(t), t.dtype, t.device, t.layout, t.shape, strides, keys.raw_repr(), t.requires_grad


def hooks_registered() -> int:
    """How many hooks of any kind were ever registered; where torch does not count them, another number each time."""
    count = getattr(torch.utils.hooks.RemovableHandle, "next_id", None)
    return count if isinstance(count, int) else time.perf_counter_ns()


def gradient_averaging_modules() -> tuple[type, ...]:
    """Wrappers whose backward talks to other processes; none where torch was built without torch.distributed."""
    if not torch.distributed.is_available():
        return ()
    found: tuple[type, ...] = (torch.nn.parallel.DistributedDataParallel,)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is sharded
    return found + ((fsdp.FullyShardedDataParallel,) if fsdp is not None else ())


def is_spread_over_devices(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def ranks() -> int:
    """Processes of the default process group; 1 without one."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def mark_symbolic(sizes: Iterable[tuple[Tensor, int]]) -> None:
    """Let a trace that these tensors are given to treat the size of these axes as symbols; it may refuse."""
    for tensor, axis in sizes:
        torch._dynamo.mark_dynamic(tensor, axis)


def mark_static(tensor: Tensor) -> None:
    """Promise that `tensor` keeps its address: CUDA graphs then update it in place instead of copying."""
    torch._dynamo.mark_static_address(tensor, guard=False)


def mark_input_static(node: torch.fx.Node) -> None:
    """Promise for an input of a captured graph what `mark_static` promises for the tensor behind it.

    Dynamo hands its own marks on to the compiler in this place.
    """
    node.meta["tensor_dict"] = {**(node.meta.get("tensor_dict") or {}), "_dynamo_static_input_type": "unguarded"}


def hand_on_static_inputs(graph: torch.fx.GraphModule) -> None:
    """Let AOTAutograd find the marks of `mark_input_static` in a graph that Dynamo did not capture.

    It looks for them only where a graph carries Dynamo's notes on where its inputs come from. Without them Inductor
    takes every input for one that moves, copies it before each replay of a CUDA graph, and makes no CUDA graph where
    such an input is written.
    """
    graph.meta.setdefault("dynamo_compile_id", None)
    if not hasattr(graph, "_param_name_to_source"):
        own = (*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False))
        notes: Any = graph
        notes._param_name_to_source = {name: torch._dynamo.source.ConstantSource(name) for name, _ in own}
    for node in graph.graph.find_nodes(op="placeholder"):
        if not hasattr(node, "_dynamo_source"):
            node._dynamo_source = None


def write(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)`` inside a traced program.

    torch 2.13 on CPU silently drops in-place writes to 0-dim float64 inputs, which it takes for Python numbers; a write
    through a view stays.
    """
    view = target.view(()) if target.ndim == 0 and target.dtype == torch.float64 else target
    view.copy_(value)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def fast_product_dtype(device_type: str) -> torch.dtype:
    """The lowest-precision dtype whose matrix products the device has instructions for: bf16, fp16 or fp32.

    A CPU multiplies bf16 without such instructions, too, but converts every entry: 18 times slower than fp32 was
    measured. torch's own queries answer, so the variables that limit its kernels count.
    """
    if device_type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.version.hip or torch.cuda.get_device_capability() >= (7, 0) else torch.float32
    if device_type != "cpu":
        return torch.bfloat16 if device_type == "xpu" else torch.float32
    return torch.bfloat16 if cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16."""
    has_bf16 = bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)())
    own: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if own.get("architecture") == "x86_64":  # where oneDNN takes any AVX-512 for support
        has_bf16 &= bool(own.get("avx512_bf16") or own.get("amx_bf16"))
    return has_bf16


def own_code(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Copy `fn` with a code object of its own. Dynamo counts recompiles by code object, which two steps must not
    share."""
    assert isinstance(fn, types.FunctionType)
    copy = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    copy.__kwdefaults__ = fn.__kwdefaults__
    return copy


def backend_for(backend: str, mode: str) -> Callable[..., Any]:
    """A torch.compile backend, as ``(graph, inputs) -> callable``; `mode` counts for ``"inductor"`` only."""
    if backend != "inductor":
        found: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
        return found
    wrapper: Any = torch._TorchCompileInductorWrapper  # what torch.compile itself makes of its mode
    made: Callable[..., Any] = wrapper(None if mode == "default" else mode, None, dynamic=False)
    return made


def observed_backend(
    backend: str,
    mode: str,
    on_graph: GraphObserver,
    around: Callable[[torch.fx.GraphModule], Any] | None = None,
    beside: Callable[[torch.fx.GraphModule, Callable[..., Any]], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Make a torch.compile backend that shows each captured graph to `on_graph` and then calls `backend`, inside the
    context manager that `around` gives for the graph. `beside`: from a copy of the graph and the compiled function to
    what runs in its place."""
    inner = backend_for(backend, mode)

    def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        on_graph(graph, inputs)
        kept = None if beside is None else copy.deepcopy(graph)  # a compiler rewrites what it is given
        with contextlib.nullcontext() if around is None else around(graph):
            compiled = inner(graph, inputs)
        return compiled if beside is None or kept is None else beside(kept, compiled)

    return compile_graph


def user_frames(error: BaseException) -> list[traceback.FrameSummary]:
    """Python frames of the traced program where Dynamo gave up, outermost first; empty when unknown."""
    stack = getattr(error, "real_stack", None)
    return list(stack) if stack else []


def failed_in_dynamo(error: Exception) -> bool:
    """Whether Dynamo itself failed while it read a program or had it compiled. What a compiled program raises while it
    runs is no such failure, nor is a refusal of ours."""
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        return True
    if isinstance(error, (ValueError, torch.OutOfMemoryError)):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.filename.endswith("convert_frame.py") for frame in frames)


def refusal_inside(error: Exception) -> ValueError | None:
    """Unwrap the ValueError with which an observer refused a graph; None for any other error."""
    inner = getattr(error, "inner_exception", None)
    return inner if isinstance(inner, ValueError) else None


def recomputation_refused(error: BaseException) -> str:
    """What torch says where it cannot recompute checkpointed activations in a captured step; empty for other errors."""
    inner = getattr(error, "inner_exception", error)
    return str(inner) if "Activation checkpoint rematerialization" in str(inner) else ""


def where_a_size_is_fixed(error: BaseException) -> str:
    """The user's line at which a trace with symbolic sizes needed a number; what torch says where it names none."""
    lines = [line.strip() for line in str(error).splitlines()]
    at = [(line, code) for line, code in pairwise(lines) if line.startswith('File "')]
    if not at:
        return next((line for line in lines if line), type(error).__name__).rstrip(".")
    where, code = at[-1]
    name, _, rest = where.removeprefix('File "').partition('", line ')
    return f"at {name}:{rest.partition(',')[0]}: {code.partition('  # ')[0]}"


def misses_a_parameter(error: BaseException) -> bool:
    """Whether autograd, inside a trace, did not find one of the tensors whose gradient was asked for."""
    return "appears to not have been used in the graph" in str(error)


def compilers_reason(error: BaseException) -> str:
    """The first line of what a compiler said when it refused a graph, without its end mark."""
    inner = getattr(error, "inner_exception", None) or error
    return str(inner).strip().partition("\n")[0].rstrip(".")


@contextlib.contextmanager
def shapes_as_the_kernels_have_them() -> Iterator[None]:
    """Inside, fake tensors are let through where torch's shape functions refuse what its kernels compute.

    ``_grouped_mm`` takes fp32 and fp16 beside bf16 (mixtures of experts call it in the dtype of their weights), and its
    shape function bf16 alone. What else the kernel asks for is checked by a run on real tensors.
    """
    metas = torch._meta_registrations
    strict = getattr(metas, "_meta_grouped_mm_common", None)
    shape_of = getattr(metas, "_create_grouped_mm_output_tensor", None)
    if strict is None or shape_of is None:
        yield
        return

    def lenient(mat_a: Tensor, mat_b: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if mat_a.dtype == mat_b.dtype and mat_a.dtype in (torch.float32, torch.float16):
            return shape_of(mat_a, mat_b, kwargs.get("offs"), kwargs.get("out_dtype"))  # type: ignore[no-any-return]
        return strict(mat_a, mat_b, *args, **kwargs)  # type: ignore[no-any-return]

    metas._meta_grouped_mm_common = lenient
    try:
        yield
    finally:
        metas._meta_grouped_mm_common = strict


@contextlib.contextmanager
def distributions_check_nothing() -> Iterator[None]:
    """Inside, ``torch.distributions`` takes its arguments for right, whatever `validate_args` says.

    The checks read numbers on the host, and end in an error or in nothing.
    """
    base: Any = torch.distributions.Distribution
    own = base._validate_args
    base._validate_args = property(lambda self: False, lambda self, value: vars(self).update(_validate_args=value))
    try:
        yield
    finally:
        base._validate_args = own


def input_source(node: torch.fx.Node) -> str:
    """The expression by which a captured program finds an input, ``L['state']['counts/step']``; "" if unknown."""
    # A method in torch 2.11, a property later.
    name = getattr(getattr(node, "_dynamo_source", None), "name", "")
    return str(name() if callable(name) else name)
