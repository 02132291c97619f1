"""All that has to be replaced in torch so that Inductor writes the program of a GPU that is not there.

Inductor asks torch for a device in a dozen places, and every name that is replaced is in this file. Nothing runs on the
GPU: tensors are fake, and Inductor's result is its text. With the CPU build of torch and the Triton wheel that torch's
CUDA build pins, the text is what torch would write on the GPU, but for what is measured there: no autotuning takes
place, and matrix products are cuBLAS's.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_compile import _compat
from fusion_compile._gpu_program.cubin import needs
from fusion_compile._gpu_program.generated import Generated, Launch, Partition
from fusion_compile._gpu_program.kernels import Compiled, Kernel
from fusion_compile._gpu_program.moved import moved_to_gpu, why_not_on_gpu
from fusion_compile._program.lower import inductor_as_told
from fusion_compile._program.memory import banks_first
from fusion_compile.passes import exchange_rates, hoist_time_conditioning


class Gpu(NamedTuple):
    """What Inductor asks of a GPU. Memory in bytes."""

    name: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    L2_cache_size: int
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    shared_memory_per_block: int = 49152
    gcnArchName: str = ""

    @property
    def architecture(self) -> int:
        """Triton's number: 90 for compute capability 9.0."""
        return 10 * self.major + self.minor


H100 = Gpu("NVIDIA H100", 9, 0, 132, 80 << 30, 232448, 233472, 50 << 20)
ARCHITECTURES = (80, 90, 100)
"""A100, H100, B200."""

_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>); }
"""
"""C++ asks a device guard before it writes into a tensor, a fake one too, and torch's CPU build has none for CUDA."""


def why_not() -> str:
    """What keeps this machine from writing a GPU's program, with the remedy; "" if nothing does."""
    if importlib.util.find_spec("triton") is None:
        return (
            "Triton is not installed, which turns a program's kernels into a GPU's code; install the version that "
            "torch's CUDA build pins, pip install --no-deps triton==3.7.1 for torch 2.13 (x86-64, 0.7 GB)."
        )
    from torch._inductor import compile_fx
    from torch._inductor.graph import GraphLowering

    ends = ((GraphLowering, "compile_to_module"), (compile_fx, "cudagraphify"))  # of what `generate` takes over
    asked = (*ends, *((owner, name) for owner, name, _ in _replacements(H100)))
    missing = [f"{_said(owner)}.{name}" for owner, name in asked if not hasattr(owner, name)]
    missing = [name for name in missing if not name.startswith("torch._C.")]  # added where a CPU build lacks them
    if missing:
        return (
            f"torch {torch.__version__} has moved {', '.join(missing)}; fusion_compile/_gpu_program/_compat.py "
            f"replaces these names and must follow."
        )
    return ""


def load_guard() -> None:
    """Give torch's CPU build a device guard for CUDA that does nothing. Once in a process, before the first gradient
    is computed in it; a torch with CUDA has its own."""
    if torch.version.cuda is not None or _loaded:
        return
    include, lib = Path(torch.__file__).parent / "include", Path(torch.__file__).parent / "lib"
    key = hashlib.sha256(f"{torch.__version__}{include}{_GUARD}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"fusion_compile_cuda_guard_{os.getuid()}_{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
            source.write_text(_GUARD)
            compiler = os.environ.get("CXX", "g++")
            command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{include}", str(source), f"-L{lib}", "-lc10"]
            subprocess.run([*command, "-o", str(made)], check=True)
            os.replace(made, library)
    _loaded.append(ctypes.CDLL(str(library)))


_loaded: list[ctypes.CDLL] = []


class _OnTheCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, factories make what Inductor evaluates while it folds constants on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in (kwargs or {}).items()}
        return func(*args, **given)


def _replacements(gpu: Gpu) -> list[tuple[Any, str, Any]]:
    """``(owner, name, stand-in)`` of everything that is replaced."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder as Folder

    def yes(*_: Any, **__: Any) -> bool:
        return True

    def zero(*_: Any) -> int:
        return 0

    def nothing(*_: Any, **__: Any) -> None:
        return None

    deduce = Folder._deduce_value

    def deduce_on_cpu(self: Any, node: Any) -> Any:
        with _OnTheCpu():  # type: ignore[no-untyped-call]
            return deduce(self, node)

    def properties(device: Any = None) -> Gpu:
        return gpu

    def one(*_: Any) -> int:
        return 1

    asked: dict[str, Callable[..., Any]] = {
        "is_available": yes,
        "is_initialized": yes,
        "is_bf16_supported": yes,
        "device_count": one,
        "current_device": zero,
        "synchronize": nothing,
        "set_device": nothing,
        "_lazy_init": nothing,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
        "get_device_properties": properties,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
    }
    below: dict[str, Callable[..., Any]] = {
        "_cuda_getDevice": zero,
        "_cuda_getCurrentRawStream": zero,
        "_cuda_exchangeDevice": zero,
        "_cuda_maybeExchangeDevice": zero,
        "_cuda_setDevice": nothing,
        "_cuda_cudaCachingAllocator_is_enabled": yes,
    }
    interface = ("current_device", "device_count", "get_device_properties", "synchronize")
    return [
        *((torch.cuda, name, stand_in) for name, stand_in in asked.items()),
        *((torch._C, name, stand_in) for name, stand_in in below.items()),
        *((CudaInterface, name, staticmethod(asked[name])) for name in interface),
        (torch.version, "cuda", "12.8"),
        (FakeTensorMode, "avoid_device_init", property(yes)),
        (Folder, "_deduce_value", deduce_on_cpu),
    ]


def _said(owner: Any) -> str:
    return str(getattr(owner, "__name__", owner))


@contextlib.contextmanager
def pretended(gpu: Gpu) -> Iterator[None]:
    """Inside, torch believes in one `gpu`. Nothing may be launched."""
    if reason := why_not():
        raise RuntimeError(reason)
    load_guard()
    import torch.utils._triton as asks_for_triton

    compiler: Any = importlib.import_module("triton.backends.compiler")
    driver: Any = importlib.import_module("triton.runtime").driver
    target = compiler.GPUTarget("cuda", gpu.architecture, gpu.warp_size)
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            is_active=lambda: True,
        )
    )
    remembered = [f for f in vars(asks_for_triton).values() if hasattr(f, "cache_clear")]
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in _replacements(gpu):
            stack.enter_context(mock.patch.object(owner, name, stand_in, create=owner is torch._C))
        for answer in remembered:
            answer.cache_clear()
        yield
    for answer in remembered:
        answer.cache_clear()


@contextlib.contextmanager
def captured_for(gpu: Gpu) -> Iterator[None]:
    """Inside, this package answers on the CPU what it would answer on `gpu` where the answer changes a program: which
    products are fast (the dtype of Newton-Schulz's), what a launch costs (what the sampler computes once), and where
    gradients are written (in their banks)."""
    hoisting = sys.modules[hoist_time_conditioning.__module__]
    on_gpu, bf16 = exchange_rates(torch.device("cuda")), gpu.major >= 8
    with (
        mock.patch.object(hoisting, "exchange_rates", lambda device: on_gpu),
        mock.patch.object(_compat, "cpu_multiplies_bf16", lambda: bf16),
        mock.patch.object(banks_first, "banks_first", lambda device_type: True),
    ):
        yield


def generate(graph: fx.GraphModule, *, mode: str = "max-autotune", gpu: Gpu = H100, as_told: bool = True) -> Generated:
    """What Inductor writes for `graph` on `gpu` in torch.compile's `mode`. `graph` is changed: it lies on the GPU then.
    `as_told`: with what this package tells Inductor; without it, what torch alone writes.

    Raises:
        RuntimeError: Triton is missing, or torch has moved what must be replaced.
        ValueError: The graph holds what no GPU's program can; the sentence names the line.
    """
    from torch._inductor import compile_fx, list_mode_options
    from torch._inductor.graph import GraphLowering

    found = Generated()
    own = [name for name, _ in (*graph.named_parameters(), *graph.named_buffers())]  # AOTAutograd puts them first
    names = [*own, *(node.name for node in graph.graph.find_nodes(op="placeholder"))]
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def keep(self: Any) -> Any:
        found.codes.append(self.codegen()[0].value)
        found.launches += _launches(self)
        found.devices |= set(map(str, self.device_types))
        if self.disable_cudagraphs_reason:
            found.skips.append(str(self.disable_cudagraphs_reason))

        def recorded(functions: Sequence[Any]) -> None:
            found.partitions.extend(_partition(f.keywords, names) for f in functions)

        runner = types.SimpleNamespace(partitions=[], recursively_apply_fns=recorded)
        return types.SimpleNamespace(call=lambda args: None, __file__=__file__, runner=runner)

    def cudagraphify(run: Any, *_: Any, **given: Any) -> Any:
        found.partitions.append(_partition(given, names))
        return run

    options = {
        **list_mode_options(mode),
        "max_autotune_gemm_backends": "ATEN",  # which kernel wins is measured on the GPU
        "shape_padding": False,  # so is whether padding pays
        "force_disable_caches": True,
        "compile_threads": 1,
    }
    with (
        pretended(gpu),
        mock.patch.object(GraphLowering, "compile_to_module", keep),
        mock.patch.object(compile_fx, "cudagraphify", cudagraphify),
    ):
        inputs = moved_to_gpu(graph, fake)
        told = inductor_as_told(graph) if as_told else contextlib.nullcontext()
        with tracing(TracingContext(fake)), torch.no_grad(), told:
            try:
                compile_fx.compile_fx(graph, inputs, config_patches=options)
            except Exception as error:  # of any kind: torch's words do not name the line
                if reason := why_not_on_gpu(graph):
                    raise ValueError(reason) from error
                raise
    return found


def _partition(given: Any, inputs: Sequence[str]) -> Partition:
    """AOTAutograd calls the inputs of a graph without gradients ``arg0_1``, ``arg1_1``, …"""

    def said(name: str) -> str:
        match = re.fullmatch(r"arg(\d+)_1", name)
        return inputs[int(match[1])] if match else name

    names = tuple(said(place.name) for place in given["placeholders"])
    return Partition(
        names,
        frozenset(names[i] for i in given["static_input_idxs"]),
        frozenset(names[i] for i in given["mutated_input_idxs"]),
    )


_LATEST_FIRST = ("optimizer", "backward", "forward")


def _launches(graph: Any) -> list[Launch]:
    found: dict[str, Launch] = {}
    for node in graph.scheduler.nodes:
        kind = type(node).__name__
        if kind.startswith("Nop"):
            continue  # it launches nothing
        if type(node.node).__name__ == "MultiOutput":  # one of the results of a launch before it
            source = node.node.inputs[0].get_name()
            found[source] = found[source]._replace(moved=found[source].moved + _bytes(node.node))
            continue
        regions = {
            str((origin.meta.get("custom") or {}).get("region", "state"))
            for part in node.get_nodes()
            if part.node is not None
            for origin in part.node.get_origins()
            if origin.op == "call_function"
        }
        region = next((r for r in _LATEST_FIRST if r in regions), "state")
        extern = kind.startswith("Extern")
        name = getattr(node.node, "python_kernel_name", None) if extern else None
        moved = sum(map(_bytes, (*node.node.inputs, node.node))) if extern else _moved_by_kernel(graph, node)
        of = node.node.get_name() if extern else node.get_name()
        found[of] = Launch(region, "extern" if extern else "triton", str(name or node.get_name()), moved)
    return list(found.values())


def _bytes(tensor: Any) -> int:
    """Of a tensor of Inductor's; 0 for what is none, or several."""
    try:
        return math.prod(int(size) for size in tensor.get_size()) * int(tensor.get_dtype().itemsize)
    except (AttributeError, NotImplementedError, TypeError):
        return 0


def _moved_by_kernel(graph: Any, node: Any) -> int:
    """Bytes that a kernel reads and writes if it touches each entry that it uses once."""
    gone = {*graph.removed_buffers, *graph.inplaced_to_remove}
    moved: dict[str, int] = {}
    for access in {*node.read_writes.reads, *node.read_writes.writes}:
        if access.name in gone or type(access).__name__ == "WeakDep":
            continue
        indirect = getattr(access, "is_indirect", bool)()
        entries = math.prod(access.size) if indirect else access.get_numel()
        size = graph.get_dtype(access.name).itemsize
        whole = graph.get_numel(access.name) * size
        moved[access.name] = min(int(whole), moved.get(access.name, 0) + int(entries) * size)
    return sum(moved.values())


def compile_kernel(kernel: Kernel, architecture: int, *, configurations: int | None = None) -> list[Compiled]:
    """Compile a Triton kernel of Inductor's for `architecture`, in each configuration that Inductor would try there.

    Inside `pretended`. `configurations`: at most so many.
    """
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    launchers = ("use_static_triton_launcher", "use_static_cuda_launcher", "static_launch_user_defined_triton_kernels")
    off = {option: False for option in launchers if hasattr(config, option)}
    major = architecture // 10
    source = re.sub(r"cc=\d+, major=\d+", f"cc={architecture}, major={major}", kernel.source)
    found = []
    with config.patch(off), mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        tuner: Any = getattr(PyCodeCache.load(source), kernel.name)
        for tried in tuner.configs[:configurations]:
            try:
                binary = tuner._precompile_config(tried).kernel
                taken = needs(binary.asm["cubin"])
                found.append(Compiled(str(tried), taken.registers, taken.local, binary.metadata.shared))
            except Exception as error:  # of any kind: it is the answer
                found.append(Compiled(str(tried), 0, 0, 0, error=f"{type(error).__name__}: {error}".partition("\n")[0]))
    return found
