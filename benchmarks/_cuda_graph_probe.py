"""What really happened on the GPU: CUDA graphs recorded and replayed, what Inductor left out of them, waits, launches.

Two independent witnesses, because neither is an interface that torch promises: `torch.cuda.CUDAGraph`'s own methods,
which every recording and replay must call, and the private records of Inductor and of its CUDA-graph trees. What a
version of torch does not have is None, never an error. On a machine without a GPU everything here counts nothing.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class CompiledGraph:
    """One graph as Inductor finished it. `partitions`: CUDA graphs it is cut into, None where torch does not cut."""

    partitions: int | None
    refusals: tuple[str, ...]
    written_not_static: int | None
    """Inputs that the graph writes although they are not static: one is enough for Inductor to leave CUDA graphs alone.
    None where Inductor was not asked for CUDA graphs."""


@dataclass
class Witness:
    """Counts since `watching` began."""

    recordings: int = 0
    replays: int = 0
    compiled: list[CompiledGraph] = field(default_factory=list)
    _before: dict[str, int] = field(default_factory=dict)

    def counted(self, name: str) -> int:
        """One of `COUNTED`, torch's own counters."""
        return _counter(name) - self._before.get(name, 0)


def _counter(name: str) -> int:
    counters = getattr(getattr(getattr(torch, "_dynamo", None), "utils", None), "counters", None)
    return 0 if counters is None else int(counters["inductor"][name])


COUNTED = ("cudagraph_skips", "cudagraph_partitions", "cudagraph_recorded_non_static_inputs")


@contextlib.contextmanager
def watching() -> Iterator[Witness]:
    """Inside, recordings, replays and finished graphs are counted."""
    seen = Witness(_before={name: _counter(name) for name in COUNTED})
    with contextlib.ExitStack() as undo:
        if torch.cuda.is_available():

            def recorded(*_: Any, **__: Any) -> None:
                seen.recordings += 1

            def replayed(*_: Any, **__: Any) -> None:
                seen.replays += 1

            _call_before(undo, torch.cuda.CUDAGraph, "capture_begin", recorded)
            _call_before(undo, torch.cuda.CUDAGraph, "replay", replayed)
        finished = _finished_graph_class()
        if finished is not None:
            _call_before(undo, finished, "post_compile", lambda graph, *_, **__: seen.compiled.append(_facts(graph)))
        yield seen


def _call_before(undo: contextlib.ExitStack, owner: Any, name: str, also: Callable[..., None]) -> None:
    """Until `undo`, calling ``owner.name`` calls `also` first. Nothing happens where there is no such method."""
    original = getattr(owner, name, None)
    if original is None:
        return
    inherited = name not in vars(owner)

    def both(*args: Any, **kwargs: Any) -> Any:
        also(*args, **kwargs)
        return original(*args, **kwargs)

    setattr(owner, name, both)
    undo.callback(delattr, owner, name) if inherited else undo.callback(setattr, owner, name, original)


def _finished_graph_class() -> Any:
    try:
        from torch._inductor.output_code import CompiledFxGraph
    except ImportError:
        return None
    return CompiledFxGraph


def _facts(graph: Any) -> CompiledGraph:
    maps = getattr(graph, "partition_maps", None)
    info = getattr(graph, "cudagraph_info", None)
    refusals = [str(reason) for reason in getattr(info, "cudagraph_fail_reasons", None) or ()]
    if reason := getattr(graph, "disabled_cudagraphs_reason", None):
        refusals.append(str(reason))
    arguments = getattr(graph, "fx_kwargs", None) or {}
    written = set(getattr(graph, "mutated_input_idxs", ()))
    static = set(arguments.get("static_input_idxs") or ())
    return CompiledGraph(
        None if maps is None else len(maps), tuple(refusals), len(written - static) if arguments else None
    )


def _trees() -> Any:
    try:
        from torch._inductor import cudagraph_trees
    except ImportError:
        return None
    return cudagraph_trees


@dataclass(frozen=True)
class Trees:
    """`graphs`: recorded and alive in Inductor's trees. `failed_to_match`: calls that found no recording to replay."""

    graphs: int
    failed_to_match: int | None


def trees(device: torch.device) -> Trees | None:
    """The state of the CUDA-graph trees; None where there is none or this torch keeps it elsewhere."""
    module = _trees()
    if device.type != "cuda" or module is None or not hasattr(module, "get_manager"):
        return None
    manager = module.get_manager(device.index or torch.cuda.current_device(), create_if_none_exists=False)
    roots = getattr(manager, "roots", None)
    if roots is None:
        return None
    todo = [node for nodes in roots.values() for node in nodes]
    graphs = 0
    while todo:
        node = todo.pop()
        graphs += 1
        todo += [child for children in getattr(node, "children", {}).values() for child in children]
    return Trees(graphs, getattr(manager, "debug_fail_counter", None))


def forget_everything() -> None:
    """Compiled code, recorded graphs and cached memory, so that the next contender starts from nothing."""
    torch.compiler.reset()
    gc.collect()
    module = _trees()
    if torch.cuda.is_available() and hasattr(module, "reset_cudagraph_trees"):
        module.reset_cudagraph_trees()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _inductor_setting(name: str, value: Any) -> contextlib.AbstractContextManager[Any]:
    import torch._inductor.config as config

    try:
        getattr(config.triton, name)
    except AttributeError:
        return contextlib.nullcontext()
    return config.patch({f"triton.{name}": value})


def skipping_is_an_error() -> contextlib.AbstractContextManager[Any]:
    """Inside, what Inductor otherwise only logs, leaving CUDA graphs alone, raises."""
    return _inductor_setting("cudagraph_or_error", True)


def without_replay() -> contextlib.AbstractContextManager[Any]:
    """Inside, what was compiled for replay runs the same kernels one by one."""
    return _inductor_setting("force_cudagraphs_warmup", True)


def can_run_without_replay() -> bool:
    import torch._inductor.config as config

    return hasattr(config.triton, "force_cudagraphs_warmup")


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device, mode: str = "error") -> Iterator[None]:
    """Inside, what makes the host wait for the GPU raises, or warns (``mode="warn"``); a CPU waits at will."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@dataclass(frozen=True)
class Launches:
    """Calls of the CUDA runtime while `calls` steps ran, by kind."""

    calls: int
    graphs: int
    kernels: int
    copies: int
    waits: int
    """For a stream or an event; the profiler itself waits for the whole device when it ends."""
    seen_on_gpu: int
    """Kernels and copies that ran on the GPU; 0 means that the profiler sees nothing here."""

    def __str__(self) -> str:
        n = self.calls
        return (
            f"per step {self.graphs / n:g} graph launches, outside it {self.kernels / n:g} kernels and "
            f"{self.copies / n:g} copies; {self.waits} waits; "
            f"{self.seen_on_gpu / n:g} kernels and copies ran on the GPU per step"
        )


def launches(run: Callable[[], object], device: torch.device, calls: int = 5) -> Launches:
    """What the host asked of the CUDA runtime while `run` was called `calls` times."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            run()
    names: Counter[str] = Counter()
    on_gpu = 0
    for event in profile.events() or ():
        names[event.name] += 1
        on_gpu += event.device_type == torch.autograd.DeviceType.CUDA

    def count(*beginnings: str) -> int:
        return sum(n for name, n in names.items() if name.startswith(beginnings))

    return Launches(
        calls,
        graphs=count("cudaGraphLaunch", "cuGraphLaunch"),
        kernels=count("cudaLaunchKernel", "cuLaunchKernel"),
        copies=count("cudaMemcpyAsync", "cudaMemcpy", "cudaMemsetAsync", "cuMemcpy", "cuMemset"),
        waits=count("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize"),
        seen_on_gpu=on_gpu,
    )
