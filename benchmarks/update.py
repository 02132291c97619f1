"""The optimizer's update alone, against torch's own, on the same tensors in one process.

    python benchmarks/update.py [--rounds 15] [--json update.json]

Gradients lie where each contender's step finds them: in ``.grad`` for the peers, in the gradient banks into which the
compiled backward writes for ours (a step pays nothing for that: Inductor plans the concatenation in place). Each round
times every contender once, in turn; reported are medians and the median of the per-round ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _measure import compare, interleaved, machine, print_machine, print_timings, write_json
from torch import Tensor, nn

from fusion_compile import _compat, optim
from fusion_compile._program.lower import lower, resolve_mode
from fusion_compile._state import flat_tree
from fusion_compile._state.banks import build_layout
from fusion_compile._state.hyperparameters import Hyperparameters
from fusion_compile._state.residence import Residence
from fusion_compile._state.routing import route
from fusion_compile.optim import Context, Transform
from fusion_compile.optim._transform import bound

Shapes = list[tuple[int, ...]]

ADAPTERS: Shapes = [(16, 640), (640, 16)] * 200
DIT_S: Shapes = [
    shape
    for _ in range(12)
    for shape in (
        (1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,), (2304, 384), (2304,),
    )
]  # fmt: skip


def model_of(shapes: Shapes, device: torch.device) -> nn.Module:
    """A bare module that holds parameters of `shapes`."""
    generator = torch.Generator().manual_seed(0)
    holder = nn.Module()
    for i, shape in enumerate(shapes):
        values = torch.randn(shape, generator=generator) * 0.02
        holder.register_parameter(f"p{i}", nn.Parameter(values.to(device)))
    return holder


def ours(shapes: Shapes, transform: Transform, device: torch.device) -> Callable[[], None]:
    """The compiled update of `transform` over banks."""
    model = model_of(shapes, device)
    routes = route(model, transform.roles or ("scalar",))
    layout = build_layout(model, routes, alignment=transform.extras.alignment)
    transform = bound(transform, layout.infos)
    params = Residence(model, layout).banks
    grads = {k: torch.randn_like(b) * 1e-2 for k, b in params.items()}
    initial = transform.init(params)
    form, state = flat_tree.form(initial), dict(flat_tree.flatten(initial))
    numbers = Hyperparameters(transform.hyperparameters, layout.device, layout.state_dtype)
    for tensor in (*params.values(), *grads.values(), *state.values(), numbers.tensor):
        _compat.mark_static(tensor)

    def update(params: dict[str, Tensor], grads: dict[str, Tensor], state: dict[str, Tensor], values: Tensor) -> None:
        context = Context(numbers.by_name(values))
        updates, after = transform.update(grads, flat_tree.unflatten(form, state), params, context)
        changed = dict(flat_tree.flatten(after))
        for key, p in params.items():
            p.copy_(p + updates[key])
        for key, tensor in state.items():
            tensor.copy_(changed[key])

    run = lower(_compat.own_code(update), mode=resolve_mode(None, device))

    def step() -> None:
        with torch.no_grad():
            run(params, grads, state, numbers.tensor)

    return step


def families(shapes: Shapes, device: torch.device) -> dict[str, Callable[[], None]]:
    """The low-memory recipes, each with its default codec and with others."""
    recipes = {
        "lion bf16": optim.lion(momentum="bf16"),
        "lion int8": optim.lion(momentum="int8"),
        "adakaon without momentum": optim.adakaon(betas=(0.0, 0.999)),
        "adakaon": optim.adakaon(),
        "adakaon int8": optim.adakaon(momentum="int8"),
        "adakaon 4bit": optim.adakaon(momentum="4bit"),
        "adamuon": optim.adamuon(),
        "adapnm": optim.adapnm(),
        "prodigy": optim.prodigy(),
        "adafactor": optim.adafactor(),
        "adopt": optim.adopt(),
    }
    return {f"fusion_compile {name}": ours(shapes, transform, device) for name, transform in recipes.items()}


def with_gradients(shapes: Shapes, device: torch.device) -> list[nn.Parameter]:
    """Parameters of `shapes` with a random ``.grad``."""
    parameters = list(model_of(shapes, device).parameters())
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2
    return parameters


def torch_adamw(shapes: Shapes, device: torch.device, **kind: bool) -> Callable[[], None]:
    return torch.optim.AdamW(with_gradients(shapes, device), lr=1e-3, **kind).step


def prodigyopt(shapes: Shapes, device: torch.device) -> Callable[[], None]:
    """The authors' Prodigy, which waits for the device twice a parameter."""
    from prodigyopt import Prodigy

    return Prodigy(with_gradients(shapes, device), lr=1.0).step


def torch_muon(shapes: Shapes, device: torch.device) -> Callable[[], None]:
    """``torch.optim.Muon`` on the matrices and fused AdamW on the rest."""
    parameters = with_gradients(shapes, device)
    muon = torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=1e-3)
    adamw = torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=1e-3, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step


def main() -> None:
    """Run all sets and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    sets_known = ("adapters", "dit_s_adamw", "adapters_families", "dit_s_families", "dit_s_muon")
    parser.add_argument("--only", choices=sets_known)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = machine(device)
    print_machine(facts)
    fused = "torch AdamW(fused)"
    sets: dict[str, tuple[str, str, Callable[[], dict[str, Callable[[], None]]]]] = {
        "adapters": (
            "400 adapter tensors (16x640, 640x16)",
            fused,
            lambda: {
                fused: torch_adamw(ADAPTERS, device, fused=True),
                "torch AdamW(foreach)": torch_adamw(ADAPTERS, device, foreach=True),
                "fusion_compile adamw": ours(ADAPTERS, optim.adamw(lr=1e-3), device),
            },
        ),
        "dit_s_adamw": (
            "DiT-S set (120 tensors), AdamW",
            fused,
            lambda: {
                fused: torch_adamw(DIT_S, device, fused=True),
                "torch AdamW(foreach)": torch_adamw(DIT_S, device, foreach=True),
                "fusion_compile adamw": ours(DIT_S, optim.adamw(lr=1e-3), device),
            },
        ),
        "adapters_families": (
            "400 adapter tensors, the low-memory recipes",
            "torch AdamW(foreach)",
            lambda: {
                "torch AdamW(foreach)": torch_adamw(ADAPTERS, device, foreach=True),
                "prodigyopt Prodigy": prodigyopt(ADAPTERS, device),
                **families(ADAPTERS, device),
            },
        ),
        "dit_s_families": (
            "DiT-S set (120 tensors), the low-memory recipes",
            "torch AdamW(foreach)",
            lambda: {
                "torch AdamW(foreach)": torch_adamw(DIT_S, device, foreach=True),
                "prodigyopt Prodigy": prodigyopt(DIT_S, device),
                **families(DIT_S, device),
            },
        ),
        "dit_s_muon": (
            "DiT-S set (120 tensors), Newton-Schulz in bf16",
            "torch Muon + AdamW(fused)",
            lambda: {
                "torch Muon + AdamW(fused)": torch_muon(DIT_S, device),
                "fusion_compile muon": ours(DIT_S, optim.muon(), device),
                "fusion_compile sf_normuon": ours(DIT_S, optim.sf_normuon(), device),
            },
        ),
    }
    results = {}
    for key, (title, reference, contenders) in sets.items():
        if arguments.only in (None, key):
            timings = compare(interleaved(contenders(), device, rounds=arguments.rounds), reference)
            print_timings(title, timings)
            results[key] = {name: timing.__dict__ for name, timing in timings.items()}
    if arguments.json:
        write_json(arguments.json, {"machine": facts, "sets": results})


if __name__ == "__main__":
    main()
