"""A generated program run on the CPU: the wrapper's text as Python, its kernels by Triton's interpreter.

``TRITON_INTERPRET=1`` must be set before Triton is imported, so this runs in a process of its own:
``python -m tests.gpu_program.interpreted PRODUCTS STEP NAME…`` prints a JSON object by name. A recipe takes a step of a
small DiT, any other complete optimizer (`complete_optimizers`) of a small model with banks of every kind.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import fusion_compile as fc
from fusion_compile._gpu_program._compat import generate
from fusion_compile._gpu_program.moved import in_aten
from tests.dit_problem import batch, ridge_loss_fn, small_dit
from tests.gpu_program.complete_optimizers import FURTHER, mixed, mixed_batch, ridge_loss

_DEFINITION = re.compile(r"^(triton_\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str='cuda'\)", re.M | re.S)
_HEURISTICS = ("pointwise", "reduction", "persistent_reduction", "cooperative_reduction", "template", "foreach")
_TO_CPU = {
    "torch._C._dynamo.guards._empty_strided_cuda": "EMPTY",
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda device: 0",
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "device(type='cuda', index=0)": "device(type='cpu')",
    "from torch._C._dynamo.guards import copy_if_misaligned": "copy_if_misaligned = lambda t: t",
    "assert_alignment = torch._C._dynamo.guards.assert_alignment": "assert_alignment = lambda *given: None",
    "device='cuda:0'": "device='cpu'",
    "device=device('cuda:0')": "device=device('cpu')",
}


def _library() -> Any:
    """CUDA's mathematical library, entry by entry in numpy."""
    tl: Any = importlib.import_module("triton.language")
    handle: Any = importlib.import_module("triton.runtime.interpreter").TensorHandle
    erf: Any = importlib.import_module("scipy.special").erf

    def of_one(function: Callable[..., Any]) -> Any:
        def apply(x: Any, _semantic: Any = None, **given: Any) -> Any:
            with np.errstate(all="ignore"):
                out = function(x.handle.data).astype(x.handle.data.dtype)
            return tl.core.tensor(handle(out, x.handle.dtype), x.type)

        return apply

    def of_two(function: Callable[..., Any]) -> Any:
        def apply(x: Any, y: Any, _semantic: Any = None, **given: Any) -> Any:
            a, b = (v.handle.data if hasattr(v, "handle") else v for v in (x, y))
            one = x if hasattr(x, "handle") else y
            out = np.asarray(function(a, b)).astype(one.handle.data.dtype)
            large = x if not hasattr(y, "handle") or np.size(a) >= np.size(b) else y
            return tl.core.tensor(handle(out, one.handle.dtype), large.type)

        return apply

    names = "sin cos exp log tanh sqrt floor ceil log1p expm1 exp2 log2 trunc rint sinh cosh isnan isinf fabs"
    return types.SimpleNamespace(
        **{name: of_one(getattr(np, name)) for name in names.split(" ")},
        erf=of_one(erf),
        rsqrt=of_one(lambda a: 1 / np.sqrt(a)),
        abs=of_one(np.abs),
        nearbyint=of_one(np.rint),
        pow=of_two(np.power),
        fmod=of_two(np.fmod),
    )


class _Kernel:
    """One kernel, launched over its whole grid by the interpreter."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        def recorded(**options: Any) -> Callable[[Any], Any]:
            def keep(function: Any) -> Any:
                self.options, self.function = options, function
                return function

            return keep

        text = re.sub(r"^@triton_heuristics\.", "@RECORD.", source, flags=re.M)
        text = text.replace("triton_helpers.set_driver_to_gpu()", "").replace("import libdevice, math", "import math")
        file = folder / f"{name}.py"
        file.write_text(text)
        record = types.SimpleNamespace(**dict.fromkeys(_HEURISTICS, recorded))
        exec(compile(text, str(file), "exec"), {"RECORD": record, "libdevice": _library(), "__file__": str(file)})
        self.name, self.sums = name, "R0_BLOCK" in text

    def run(self, *arguments: Any, stream: Any = None) -> None:
        signature = list(self.options["triton_meta"]["signature"])
        blocks = [name for name in signature if name.endswith("BLOCK")]
        given = dict(zip([name for name in signature if name not in blocks], arguments, strict=False))
        several = self.options["inductor_meta"].get("combo_grid_meta")
        sizes, grid = self._one(blocks, given) if several is None else self._several(blocks, several)
        self.function[grid](**given, **{block: sizes[block] for block in blocks})

    def _one(self, blocks: list[str], given: dict[str, Any]) -> tuple[dict[str, int], tuple[int, ...]]:
        hints = self.options["size_hints"]
        numel = {f"{axis}BLOCK": given.get(f"{axis.lower()}numel", 1) for axis in ("X", "Y", "Z", "R0_", "R1_")}
        sizes = {}
        for block in blocks:
            most = 1024 if block[0] == "R" else 4096 if "y" not in hints else 64
            sizes[block] = min(1 << max(0, int(numel[block]) - 1).bit_length(), most)
        if "R0_BLOCK" in blocks or "r0_" in hints:
            sizes["XBLOCK"] = min(sizes.get("XBLOCK", 1), 64)
        grid = tuple(-(-int(numel[block]) // sizes.get(block, 1)) for block in ("XBLOCK", "YBLOCK", "ZBLOCK"))
        return sizes, grid if "XBLOCK" in blocks else (int(numel["XBLOCK"]), 1, 1)

    def _several(self, blocks: list[str], kernels: dict[str, Any]) -> tuple[dict[str, int], tuple[int, ...]]:
        """Several kernels in one launch: their blocks stand behind each other in the grid, or take turns."""
        sizes = dict.fromkeys(blocks, 64 if self.sums else 4096)
        xs = [(kernels[f"xnumel_{i}"], kernels[f"no_x_dim_{i}"]) for i in range(kernels["num_kernels"])]
        of_each = [size if fixed else -(-size // sizes["XBLOCK"]) for size, fixed in xs]
        turns = self.options["inductor_meta"]["grid_type"] == "RoundRobinComboKernelGrid"
        x = max(max(of_each) * len(of_each) if turns else sum(of_each), kernels["min_blocks"] or 0)
        ys = [-(-size // sizes["YBLOCK"]) for name, size in kernels.items() if name.startswith("ynumel_")]
        return sizes, (x, max(ys, default=1), 1)


def run_on_cpu(code: str, inputs: list[Tensor]) -> None:
    """Run a generated program on CPU tensors; it writes into them. Buffers begin as NaN: an early read shows."""

    def empty(size: Any, stride: Any, dtype: torch.dtype) -> Tensor:
        t = torch.empty_strided(size, stride, dtype=dtype)
        return t.fill_(float("nan")) if dtype.is_floating_point else t

    wrapper = _DEFINITION.sub("", code)
    for on_gpu, on_cpu in _TO_CPU.items():
        wrapper = wrapper.replace(on_gpu, on_cpu)
    with tempfile.TemporaryDirectory() as folder:
        names: dict[str, Any] = {"EMPTY": empty, "__name__": "generated", "__file__": "generated.py"}
        names |= {name: _Kernel(name, source, Path(folder)) for name, source in _DEFINITION.findall(code)}
        exec(compile(wrapper, "generated.py", "exec"), names)
        names["call"](inputs)


_LARGE_EPS: dict[str, dict[str, float]] = {
    "adamw": {"eps": 1e-3},
    "muon": {"scalar_eps": 1e-3},
    "normuon": {"scalar_eps": 1e-3},
    "sf_adamw": {"eps": 1e-3},
    "sf_normuon": {"eps": 1e-3},
    "soap": {"eps": 1e-3},
}
"""Adam's first step is g / (|g| + eps). With its usual eps of 1e-8 an entry whose gradient is of that size moves by
another part of the step for every rounding of the gradient: 1.5 % of the step was seen."""
WITH_PRODUCTS = ("muon", "normuon", "sf_normuon", "full_fusion")


class _Kept:
    """A backend that runs programs as they were captured, and keeps what each was last given: state, batch, tables."""

    name = "keeps_its_inputs"

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []

    def __call__(self, graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        kept: list[Tensor] = []
        self.inputs.append(kept)

        def run(*given: Tensor) -> Any:
            kept[:] = [t.detach().clone() for t in given]
            return graph.forward(*given)

        return run


KEPT = _Kept()
torch._dynamo.register_backend(compiler_fn=KEPT, name=KEPT.name)


class Compared(NamedTuple):
    """How one state tensor differs, relative to the largest change of an entry: the largest difference of interpreter
    and eager, of interpreter and fp64, and of eager and fp64; and the part of entries for which interpreter and eager
    differ by more than a thousandth."""

    ours: float
    exact: float
    eager: float
    off: float


def step_of(name: str, products: str, dtype: torch.dtype, **options: Any) -> tuple[fc.TrainingStep, tuple[Tensor, ...]]:
    """A step and its batch. `products`: the dtype of Newton-Schulz's products; "" for the recipe's own."""
    asked = dtype if dtype == torch.float64 else getattr(torch, products) if products else None
    if name in FURTHER:
        optimizer: Any = FURTHER[name](asked)
        step = fc.compile_training_step(mixed(dtype), ridge_loss, optimizer=optimizer, **options)
        return step, mixed_batch()
    given: dict[str, Any] = dict(_LARGE_EPS.get(name, {}))
    if asked is not None and name in WITH_PRODUCTS:
        given["matmul_dtype"] = asked
    optimizer = fc.optim.RECIPES[name](lr=1e-3, **given)
    model = small_dit(1).to(dtype)
    step = fc.compile_training_step(model, ridge_loss_fn, optimizer=optimizer, clip_grad_norm=1.0, **options)
    return step, batch(1, 4)


def compared(name: str, products: str, number: int = 1) -> dict[str, Compared]:
    """By state tensor that a step changes: step `number` by the interpreter, in mode "eager", and that in fp64, from
    one state: that of the steps before as they were captured."""
    KEPT.inputs.clear()
    with sdpa_kernel(SDPBackend.MATH):  # the others have no kernel on a CPU for what the program holds
        eager, given = step_of(name, products, torch.float32, mode="eager")
        exact, _ = step_of(name, products, torch.float64, mode="eager")
        step, _ = step_of(name, products, torch.float32, backend=KEPT.name)
        in_double = [t.double() if t.is_floating_point() else t for t in given]
        for _ in range(number - 1):
            step(*given), eager(*given), exact(*in_double)
            for key, value in step._state.items():
                eager._state[key].copy_(value)
                exact._state[key.replace("float32", "float64")].copy_(value)
        before = {key: value.clone() for key, value in step._state.items()}
        step(*given), eager(*given), exact(*in_double)
        (program,) = step.programs
        found = generate(in_aten(program.graph, attention=False))
    inputs = dict(zip(program.input_names.values(), KEPT.inputs[0], strict=True))
    assert all(torch.equal(inputs[f"state/{key}"], value) for key, value in before.items() if f"state/{key}" in inputs)
    run_on_cpu(found.codes[0], list(KEPT.inputs[0]))

    # A basis is written by a periodic program of its own.
    written = {program.input_names[name] for partition in found.partitions for name in partition.written}
    differences: dict[str, Compared] = {}
    for key, start in before.items():
        if f"state/{key}" not in written or torch.equal(eager._state[key], start):
            continue
        ours, theirs = inputs[f"state/{key}"].double(), eager._state[key].double()
        twin = exact._state.get(key.replace("float32", "float64"))
        true = theirs if twin is None else twin.double()
        if start.numel():
            moved = float((true - start.double()).abs().max()) or 1.0
            gaps = (ours - theirs, ours - true, theirs - true)
            first, second, third = (float(gap.abs().max()) / moved for gap in gaps)
            off = float((gaps[0].abs() > 1e-3 * moved).double().mean())
            differences[key] = Compared(first, second, third, off)
    return differences


if __name__ == "__main__":
    print(json.dumps({name: compared(name, sys.argv[1], int(sys.argv[2])) for name in sys.argv[3:]}))
