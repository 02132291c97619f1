"""Report what a sampler of a model would do, without weights, without a GPU and without building it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._compat import fake_mode
from fusion_compile._sampler.conditioning import Batched, Exact
from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import trace_denoiser
from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile._sampler.report import ProgramReport, RowKind
from fusion_compile._sampler.split import split_denoiser
from fusion_compile._sampler.static_report import static_report, weights_by_time
from fusion_compile._sampler.without_weights.target import Built
from fusion_compile.passes import exchange_rates
from fusion_compile.passes._compat import tree_map

_MEANINGS = {
    "const": "by what nothing but weights decides",
    "step": "by what the timestep decides",
    "request": "by what the request decides",
    "step_request": "by what the timestep and the request decide",
    "live": "by what the latent decides",
    "unread": "by nothing that the output depends on",
}


@dataclass(frozen=True)
class SamplerAnalysis:
    """`report`: of the one program. `weights`: by when they are read last ("const", "step", "request", "step_request",
    "live", "unread"), how many and how many bytes."""

    report: ProgramReport
    weights: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        total = max(1, sum(count for count, _ in self.weights.values()))
        lines = [str(self.report), "  weights by when they are read last"]
        for time, (count, size) in self.weights.items():
            if count:
                lines.append(
                    f"    {time:<13} {count:>15,} parameters ({count / total:6.1%}), {size / 2**30:7.2f} GiB: "
                    f"{_MEANINGS[time]}"
                )
        return "\n".join(lines)


def analyse_denoiser(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    n_steps: int,
    conditioning: Exact | Batched | None = None,
    roles: Mapping[str, str] | None = None,
    byte_budget: int | None = None,
) -> SamplerAnalysis:
    """Split `model` for one call at the prices of a GPU, and build nothing; tensors may be meta or fake tensors.

    `conditioning`: None is `Exact`. Raises ValueError for a model that cannot be exported or for less than one step,
    TypeError for arguments that the model does not take.
    """
    if n_steps < 1:
        raise ValueError(f"n_steps={n_steps}; a schedule has at least one step.")
    signature = inspect.signature(model.forward)
    call = take_apart(signature, args, kwargs)
    split = split_denoiser(
        trace_denoiser(model, call),
        call,
        assign_roles(call.arguments, roles),
        n_steps=n_steps,
        byte_budget=byte_budget,
        exchange=exchange_rates(torch.device("cuda")),
    )
    rows: RowKind = "batched" if isinstance(conditioning, Batched) else "exact"
    weights = {
        time: (sum(w.numel() for w in tensors.values()), sum(w.nbytes for w in tensors.values()))
        for time, tensors in weights_by_time(split.traced.weights, split.full_names, split.hoisted).items()
    }
    report = static_report(split, model=type(model).__name__, mode="not compiled", rows=rows)
    return SamplerAnalysis(report, weights)


def analyse_without_data(build: Callable[[], Built], **options: Any) -> SamplerAnalysis:
    """`analyse_denoiser` of the model that `build` makes, on meta tensors, or on fake ones if it refuses these."""
    with torch.device("meta"):
        model, args, kwargs = build()
        nn.Module.to(model, "meta").eval()  # tensors made from numpy arrays are still on the CPU
        args, kwargs = tree_map(_to_meta, (args, kwargs))
    try:
        return analyse_denoiser(model, args, kwargs, **options)
    except ValueError as error:
        if "meta" not in str(error):  # autocast refuses meta, and some models ask for it by the latent's device
            raise
    with fake_mode(), torch.device("cpu"):
        model, args, kwargs = build()
    return analyse_denoiser(model.eval(), args, kwargs, **options)


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
