"""Private torch API of capture by running. Feature probes, never a version compare; torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import os
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Literal

import torch
import torch._dynamo
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import LocalSource
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import PythonKeyTracer, make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction

from fusion_compile.passes._user_frame import is_outside_torch

_HERE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
_FRAMES = 12
"""Innermost frames outside torch that a node's stack keeps."""
_DROPOUT = torch.ops.aten.native_dropout.default
_RECURRENT = [
    getattr(getattr(torch.ops.aten, name), overload)
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    for overload in ("input", "data")
]
_MAKE_FX = inspect.signature(make_fx).parameters


def trace_on_fakes(
    fn: Callable[..., Any], inputs: Sequence[Tensor], *, stack_traces: bool, symbolic: bool = False
) -> fx.GraphModule:
    """Run `fn` on fake tensors in the place of `inputs` and write down the ATen operators that it calls.

    Args:
        fn: Takes the tensors one by one and returns tensors.
        inputs: Real tensors; only their metadata is read. Real tensors that `fn` closes over become constants.
        stack_traces: Record the user's line for every node. Costs as much again as the trace.
        symbolic: `inputs` are the fake tensors already, some of whose sizes are symbols (`fakes_with_symbols`).

    Returns:
        The graph, with one placeholder for each input.
    """
    options: dict[str, Any] = (
        {"record_stack_traces": True} if stack_traces and "record_stack_traces" in _MAKE_FX else {}
    )
    with fx.traceback.preserve_node_meta(), _all_frames_of_the_users(), _composites_as_in_torch_compile():
        how: Literal["symbolic", "fake"] = "symbolic" if symbolic else "fake"
        trace = make_fx(fn, tracing_mode=how, _allow_non_fake_inputs=True, **options)
        return trace(*inputs)


@contextlib.contextmanager
def _composites_as_in_torch_compile() -> Iterator[None]:
    """Inside, composite operators are split up as torch.compile splits them, so that both ways of capture agree.

    Dropout is then one operator. As ``bernoulli_`` it would draw its mask in another order of memory than eager, once a
    compiler makes it functional. LSTM, GRU and RNN stay as in eager for the same reason: torch.compile's versions draw
    the masks between their layers in another order.
    """
    with contextlib.ExitStack() as stack:
        for op in _RECURRENT:
            stack.callback(op._dispatch_cache.clear)
            stack.enter_context(patched(op, "py_kernels", {}))
            op._dispatch_cache.clear()
        stack.enter_context(enable_python_dispatcher())
        yield


@contextlib.contextmanager
def _all_frames_of_the_users() -> Iterator[None]:
    """Let a node's stack hold every frame outside torch and this folder, whose modes stand between user code and torch.

    By default torch keeps those of functions named forward.
    """
    if not hasattr(PythonKeyTracer, "_filter_traceback_frames"):
        yield
        return

    def outside_torch(self: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        kept = [f for f in frames if is_outside_torch(f.filename) and not f.filename.startswith(_HERE)]
        return traceback.StackSummary.from_list(kept[-_FRAMES:])

    with patched(PythonKeyTracer, "_filter_traceback_frames", outside_torch):
        yield


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, ``owner.name`` is `value`; afterwards it is the owner's own, or inherited, as before."""
    own = name in vars(owner)
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def as_the_ordinary_loop() -> Iterator[None]:
    """Inside, user code runs as in a loop without a compiler, so that a trace sees every operator.

    Compiled submodules run uncompiled; oneDNN's fused LSTM, which a graph cannot hold, is off; anomaly detection, which
    reads values, is off; checkpointing takes its eager path; backward nodes keep the forward's lines where torch can.
    """
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the switches announce themselves
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch._dynamo.config.patch(error_on_nested_fx_trace=False))
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
            stack.enter_context(torch.inference_mode(False))
            if hasattr(torch.compiler, "_non_strict_tracing_context"):
                stack.enter_context(torch.compiler._non_strict_tracing_context())
            if hasattr(torch.compiler, "_patch_engine_backward"):
                stack.enter_context(torch.compiler._patch_engine_backward())
        yield


def _draws(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether an operator draws random numbers with these arguments. Attention without dropout is tagged as random and
    draws nothing."""
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    for i, argument in enumerate(op._schema.arguments):
        if argument.name == "dropout_p":
            return bool(kwargs.get("dropout_p", args[i] if i < len(args) else argument.default_value))
    return True


def _written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes in place."""
    given = {a.name: kwargs.get(a.name, args[i] if i < len(args) else None) for i, a in enumerate(op._schema.arguments)}
    return [given[a.name] for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]


def _dropout_with(mask: Tensor, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """``native_dropout`` with a mask that was drawn before. Multiplies in the operator's order, so the bits agree."""
    return x * mask * (0.0 if p == 1 else 1 / (1 - p)), mask


class _Around(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode around a context of the user's (one of selective checkpointing, which saves some results)."""

    def __init__(self, inner: contextlib.AbstractContextManager[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._inner = inner

    def __enter__(self) -> Any:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._inner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._inner.__exit__(*error)
        super().__exit__(*error)  # type: ignore[no-untyped-call]


class _KeepDraws(_Around):  # type: ignore[no-untyped-call]
    """Inside, what random operators draw is kept, operator by operator: what each returned, and what it wrote."""

    def __init__(self, inner: contextlib.AbstractContextManager[Any]) -> None:
        super().__init__(inner)
        self.drawn: dict[Any, list[tuple[Any, list[Any]]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _draws(func, args, kwargs or {}):
            # Copies of what was written: the CPU's dropout draws in place and then scales in place.
            written = [t.clone() for t in _written(func, args, kwargs or {})]
            kept = (None, out[1]) if func is _DROPOUT else pytree.tree_map_only(Tensor, torch.detach, out)
            self.drawn[func].append((kept, written))
        return out


class _ReuseDraws(_Around):  # type: ignore[no-untyped-call]
    """Inside, random operators give and write what they gave and wrote inside `first`, and nodes are marked with
    ``meta["custom"]["recomputed"]``, the number of the region."""

    def __init__(self, first: _KeepDraws, number: int, inner: contextlib.AbstractContextManager[Any]) -> None:
        super().__init__(inner)
        self._first, self._number = first, number
        self._next: dict[Any, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with fx.traceback.annotate({"recomputed": self._number}):
            if not _draws(func, args, kwargs or {}):
                return func(*args, **(kwargs or {}))
            out, written = self._first.drawn[func][self._next[func]]
            self._next[func] += 1
            if func is _DROPOUT:
                return _dropout_with(out[1], *args)
            targets = _written(func, args, kwargs or {})
            for target, value in zip(targets, written, strict=True):
                target.copy_(value)
            returns_target = func._schema.returns[0].alias_info is not None
            return targets[0] if returns_target else out


@contextlib.contextmanager
def checkpoints_keep_their_masks() -> Iterator[None]:
    """Inside, a checkpointed region keeps what it drew instead of drawing again; reentrant checkpointing runs as the
    other kind.

    A trace writes down both the forward and the recomputation. Drawn twice, the gradient would belong to another
    dropout mask than the loss. Reentrant checkpointing calls ``backward`` inside the backward, which no trace holds.
    A region with a ``context_fn`` of its own keeps it: what it saves is saved, and the rest computed again.
    """
    module = torch.utils.checkpoint
    generator = module._checkpoint_without_reentrant_generator
    numbers = itertools.count(1)

    def keeping(
        fn: Any, preserve_rng_state: bool = True, context_fn: Any = module.noop_context_fn, *args: Any, **kwargs: Any
    ) -> Any:
        def around() -> Any:
            forward, again = context_fn()
            first = _KeepDraws(forward)
            return first, _ReuseDraws(first, next(numbers), again)

        return generator(fn, False, around, *args, **kwargs)

    with patched(module, "_checkpoint_without_reentrant_generator", keeping), no_checkpoint_is_reentrant():
        yield


@contextlib.contextmanager
def no_checkpoint_is_reentrant() -> Iterator[None]:
    """Inside, reentrant checkpointing, which ``torch.autograd.grad`` refuses, runs as the other kind."""

    def not_reentrant(function: Any, preserve_rng_state: bool, *args: Any) -> Any:
        checkpoint = torch.utils.checkpoint.checkpoint
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)

    with patched(CheckpointFunction, "apply", staticmethod(not_reentrant)):
        yield


@contextlib.contextmanager
def modules_named(model: nn.Module) -> Iterator[None]:
    """Inside, each traced node has the name of the innermost module of `model` that called it, in
    ``meta["custom"]["module"]``."""
    names = {id(module): name for name, module in model.named_modules() if name}
    call_it = PythonKeyTracer.call_module

    def call(
        self: Any, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if id(m) not in names:
            return call_it(self, m, forward, args, kwargs)
        with fx.traceback.annotate({"module": names[id(m)]}):
            return call_it(self, m, forward, args, kwargs)

    with patched(PythonKeyTracer, "call_module", call):
        yield


def fakes_with_symbols(inputs: Sequence[Tensor], sizes: Collection[tuple[int, int]]) -> tuple[list[Tensor], Any]:
    """Fake tensors in the place of `inputs`, and what keeps the assumptions about their symbols.

    `sizes`: ``(input, axis)`` of the sizes that are symbols; every other is a number. A size of 0 or 1 is none that a
    symbol stands for.
    """
    # A value read on the host, and a shape that depends on one, are refused as they are without symbols.
    env = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False, assume_static_by_default=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
    fakes: list[Tensor] = []
    for i, tensor in enumerate(inputs):
        dims = [DimDynamic.DYNAMIC if (i, axis) in sizes else DimDynamic.STATIC for axis in range(tensor.ndim)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * tensor.ndim)
        fakes.append(mode.from_tensor(tensor, source=LocalSource(f"t{i}"), symbolic_context=context))
    return fakes, env


def fake_beside(fake: Tensor, tensor: Tensor) -> Tensor:
    """A fake tensor for `tensor`, of the same trace as `fake`; its sizes are numbers."""
    assert isinstance(fake, FakeTensor)
    return fake.fake_mode.from_tensor(tensor, static_shapes=True)


def is_symbol(size: Any) -> bool:
    """Whether a size stands for more than one number."""
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols)


@contextlib.contextmanager
def questions_about_sizes(env: Any, asked: Callable[[], object]) -> Iterator[None]:
    """Inside, `asked()` is called after each question about a symbol to which the answer is an assumption. A symbol's
    text is its number's: it is asked for."""
    plain = env.evaluate_sym_node

    def evaluate(node: Any, *args: Any, **kwargs: Any) -> Any:
        before = len(env.guards)
        outcome = plain(node, *args, **kwargs)
        if len(env.guards) > before:
            asked()
        return outcome

    def text(number: Any) -> str:
        return str(int(number))

    def formatted(number: Any, form: str) -> str:
        return format(int(number), form)

    with (
        patched(env, "evaluate_sym_node", evaluate),
        patched(torch.SymInt, "__str__", text),
        patched(torch.SymInt, "__format__", formatted),
    ):
        yield


def assumptions(env: Any, fakes: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], bool]:
    """Whether what a trace and a compiler have assumed of the symbols holds for tensors in the place of `fakes`."""
    said = env.produce_guards_expression(fakes)
    if said is None:
        return lambda _: True
    return lambda inputs: bool(env.evaluate_guards_expression(said, inputs))


def is_of_autograd(node: fx.Node) -> bool:
    """Whether autograd called the operator, or user code did inside of autograd's recomputation."""
    return bool(node.meta.get("autograd_backward"))


def is_fake(tensor: Tensor) -> bool:
    """Whether `tensor` stands for another one and has no data."""
    return isinstance(tensor, FakeTensor) or torch._is_functional_tensor(tensor)


def mark_as_parameter(tensor: Tensor) -> None:
    """Make ``isinstance(tensor, nn.Parameter)`` true for a tensor of a trace."""
    tensor._is_param = True
