"""The graphs that Dynamo captures of a callable, without lasting effect on its inputs."""

from __future__ import annotations

import contextlib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusion_compile._program.program import Program
from fusion_compile.explain import _compat
from fusion_compile.explain._run.plain_attributes import PlainAttributes
from fusion_compile.passes._compat import tree_leaves


def capture(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], watch: PlainAttributes | None = None
) -> tuple[Program, ...]:
    """Call `fn` once and return the graphs that Dynamo captured, in the order in which they ran.

    `watch`: learns which of its tensors each graph reads, and which the call replaces.

    A graph ends where Dynamo gives up, and Python continues, as under ``torch.compile``. Tensors among the arguments,
    and in the modules that `fn` is, is bound to or closes over, have their old values afterwards. Other effects of `fn`
    stay. Exceptions of `fn` pass through.
    """
    seen: list[Program] = []

    def keep(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = Program(graph, torch.is_grad_enabled())
        seen.append(program)

        def run(*given: Any) -> Any:
            results = graph.forward(*given)
            if watch is not None:
                watch.ran(program, given, tree_leaves(results))
            return results

        return run

    explained = _compat.uncompiled(fn)

    def call(*given: Any, **named: Any) -> Any:
        return explained(*given, **named)

    call.__code__ = call.__code__.replace(co_filename="<explain>")  # so that no finding names this line
    lent = {"keep": keep}
    run = torch.compile(call, backend=lambda *given: lent["keep"](*given))
    with (
        warnings.catch_warnings(),
        put_back(explained, args, kwargs),
        _compat.caches_aside(),
        _compat.dynamo_is_quiet(),
    ):
        warnings.simplefilter("ignore")  # Dynamo's warnings about breaks; the findings say so
        try:
            run(*args, **kwargs)
        finally:
            _compat.forget_compiled(call)
            lent.clear()  # torch keeps every backend, and would keep the graphs and the tensors that they saw
        if watch is not None:
            watch.look()
    return tuple(seen)


@contextlib.contextmanager
def put_back(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Restore, after the block, the values of the tensors that `fn` is given or reaches, and torch's random state.

    Of the modules that it reaches also restore the modes, what is trainable, and which tensors are plain attributes.
    """
    modules = modules_within(fn, args, kwargs)
    attributes = PlainAttributes(modules)
    tensors = [*_tensors_within(fn, args, kwargs), *attributes.tensors]
    before = [t.detach().clone() for t in tensors]
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=gpus), modes_put_back(modules):
            yield
    finally:
        attributes.put_back()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                if tensor.shape == value.shape and not _same(tensor, value):
                    tensor.copy_(value)


@contextlib.contextmanager
def modes_put_back(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Restore, after the block, whether `modules` and their parts train, and which of their parameters do."""
    modes = [(m, m.training) for module in modules for m in module.modules()]
    trainable = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, wanted in trainable:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def _same(tensor: Tensor, value: Tensor) -> bool:
    return bool(torch.equal(tensor.detach().nan_to_num(), value.nan_to_num()))


def modules_within(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[nn.Module, ...]:
    """Return the modules that `fn` is, is bound to, closes over, reads as globals or is given, each once."""
    reached = [fn, getattr(fn, "__self__", None), *tree_leaves((args, dict(kwargs)))]
    function = getattr(fn, "__func__", fn)
    if isinstance(function, types.FunctionType):
        reached += tree_leaves([cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)])
        reached += [function.__globals__[n] for n in function.__code__.co_names if n in function.__globals__]
    return tuple({id(m): m for m in reached if isinstance(m, nn.Module)}.values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _tensors_within(fn: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor):
            yield leaf
    for module in modules_within(fn, args, kwargs):
        yield from module.parameters()
        yield from module.buffers()
