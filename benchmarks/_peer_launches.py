"""What the ordinary loop launches on a GPU, counted without one: compiled model, loss outside, fused AdamW.

The model's two programs are written by Inductor for an H100. The loss, the noise and their gradients are operators of
torch, counted while they run on the CPU. The optimizer's launches follow from how torch cuts its tensors into chunks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusion_compile._gpu_program._compat import generate
from fusion_compile._gpu_program.generated import Launch
from fusion_compile._gpu_program.moved import as_on_gpu

NO_LAUNCH = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view")
TWO_LAUNCHES = ("mse_loss",)
"""The squares, and their mean."""


def model_launches(model: nn.Module, inputs: Sequence[Tensor]) -> list[Launch]:
    """Launches of the forward and backward that Inductor writes for ``torch.compile(model)``, by region."""
    found = []
    for region, graph in _forward_and_backward(model, inputs).items():
        written = generate(graph, mode="max-autotune-no-cudagraphs", as_told=False)
        found += [launch._replace(region=region) for launch in written.launches]
    return found


def _forward_and_backward(model: nn.Module, inputs: Sequence[Tensor]) -> dict[str, fx.GraphModule]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    parts: dict[str, fx.GraphModule] = {}

    def split(joint: fx.GraphModule, *args: Any, **given: Any) -> Any:
        forward, backward = min_cut_rematerialization_partition(joint, *args, compiler="inductor", **given)
        parts["forward"], parts["backward"] = copy.deepcopy(forward), copy.deepcopy(backward)
        return forward, backward

    def not_run(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        """A GPU's attention has no kernel here, and only the graphs are wanted."""
        made = [node.meta["val"] if isinstance(node, fx.Node) else node for node in graph.graph.output_node().args[0]]

        def run(args: list[Any]) -> list[Any]:
            args.clear()
            return [torch.zeros(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t for t in made]

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: fx.GraphModule, args: list[Tensor]) -> Any:
        lower = aot_autograd(
            fw_compiler=not_run, bw_compiler=not_run, partition_fn=split, decompositions=select_decomp_table()
        )
        return lower(as_on_gpu(graph), args)

    torch.compile(model, backend=backend)(*inputs)
    return parts


class Counted(TorchDispatchMode):
    """Inside, count the operators that launch something on a GPU, with the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.region = "forward"
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(NO_LAUNCH):
            tensors = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
            moved = sum(t.untyped_storage().nbytes() if t.numel() * t.element_size() else 0 for t in tensors)
            self.launches += [Launch(self.region, "eager", name, moved)] * (2 if name in TWO_LAUNCHES else 1)
        return out


class _Stub(nn.Module):
    """In the model's place: gives a leaf of the model's shape, and launches nothing."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.out = nn.Parameter(torch.zeros_like(like))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.out


def loss_launches(loss_fn: Callable[..., Tensor], batch: Sequence[Tensor]) -> list[Launch]:
    """Launches of a loss and its gradient besides those of the model, whose output is like ``batch[0]``."""
    stub = _Stub(batch[0])
    with Counted() as counted:
        loss = loss_fn(stub, *batch)
        counted.region = "backward"
        loss.backward()
    return counted.launches


CHUNK = 65536
"""Entries that one block of a fused optimizer works on, of torch's MultiTensorApply.cuh."""
AT_ONCE = {12: (36, 110, 320), 13: (252, 770, 2240)}
"""By CUDA's version: tensors of a launch of AdamW, of a launch that counts the steps, and blocks of a launch."""


def adamw_launches(model: nn.Module, *, cuda: int = 13) -> list[Launch]:
    """Launches of ``AdamW(fused=True)``: the steps' counts, and the update with four tensors a parameter."""
    sizes = [p.numel() for p in model.parameters()]
    most, most_counts, blocks = AT_ONCE[cuda]
    counts = [Launch("optimizer", "eager", "_foreach_add_", 8 * len(sizes))] * -(-len(sizes) // most_counts)
    times = chunked_launches(sizes, most, blocks)
    # Reads weight, gradient and two moments, writes all but the gradient.
    moved = sum(7 * p.numel() * p.element_size() for p in model.parameters())
    return counts + [Launch("optimizer", "eager", "_fused_adamw_", moved // times)] * times


def chunked_launches(sizes: Sequence[int], most_tensors: int, most_blocks: int) -> int:
    """How often torch's multi_tensor_apply launches for tensors of these sizes."""
    launches = tensors = blocks = 0
    for size in filter(None, sizes):
        tensors += 1
        chunks = -(-size // CHUNK)
        for chunk in range(chunks):
            blocks += 1
            last = chunk == chunks - 1
            if (tensors == most_tensors and last) or blocks == most_blocks:
                launches, blocks, tensors = launches + 1, 0, 0 if last else 1
    return launches + bool(blocks)
