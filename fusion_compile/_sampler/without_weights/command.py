"""``fusion-compile explain-sampler TARGET``: what a sampler of a model would do, without weights and without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._compat import fake_mode
from fusion_compile._factory import call_factory, described
from fusion_compile._sampler.facts import SamplerAnalysis, analyse_denoiser
from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes
from fusion_compile._sampler.without_weights.diffusers_calls import example_call, model_of_config
from fusion_compile.passes._compat import tree_map

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_MEANINGS = {
    "const": "by what nothing but weights decides",
    "step": "by what the timestep decides",
    "request": "by what the request decides",
    "step_request": "by what the timestep and the request decide",
    "live": "by what the latent decides",
    "unread": "by nothing that the output depends on",
}


def add_explain_sampler(subparsers: Any) -> None:
    """Register the command with an argparse object's subparsers; ``args.run(args)`` gives the exit status."""
    parser = subparsers.add_parser(
        "explain-sampler",
        help="what optimize_sampler would do to a model, without weights and without a GPU",
        description="Export a denoiser on meta tensors and say what leaves the sampling loop, what is freed and what "
        "is declined.",
    )
    parser.add_argument(
        "target",
        metavar="MODEL_CONFIG",
        help="a diffusers config.json, a folder with one, or module:factory, where factory() returns (model, args) or "
        "(model, args, kwargs)",
    )
    parser.add_argument("--steps", type=int, default=50, help="steps of the schedule, default 50")
    parser.add_argument("--roles", nargs="+", default=[], metavar="NAME=ROLE", help="step, request or live")
    parser.add_argument("--batched", action="store_true", help="rows of all steps in one batch, as exact=False")
    parser.add_argument("--byte-budget", type=float, default=None, metavar="MIB", help="of the table")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=None, help="of the weights; by default bfloat16 for a config"
    )
    for name, meaning in (
        ("batch", "samples in the call, with guidance twice the images"),
        ("height", "of the latent, before patches"),
        ("width", "of the latent, before patches"),
        ("frames", "of the latent"),
        ("text", "tokens of the text"),
    ):
        parser.add_argument(f"--{name}", type=int, default=2 if name == "batch" else None, help=meaning)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=_run)


def explain_sampler(
    target: str,
    *,
    n_steps: int = 50,
    exact: bool = True,
    byte_budget: int | None = None,
    roles: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    sizes: CallSizes | None = None,
) -> str:
    """The report on `target`: a diffusers config.json, a folder with one, or ``module:factory``.

    `dtype`: of the weights and of what is given with them, by default bfloat16 for a config and as it is for a factory;
    modules that the class keeps in float32 stay so. `sizes`: of a config's call. Raises ValueError with a sentence for
    what cannot be found, built, called or exported.
    """
    return _text(
        _analyse(target, n_steps=n_steps, exact=exact, byte_budget=byte_budget, roles=roles, dtype=dtype, sizes=sizes)
    )


Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
"""A model and the arguments of one call of it."""


def build_target(target: str, dtype: torch.dtype | None = None, sizes: CallSizes | None = None) -> Built:
    """What `target` names, with new weights, on the device that is the default here; see `explain_sampler`."""
    if ":" not in target or Path(target).exists():
        return with_example(model_of_config(target), dtype or torch.bfloat16, sizes)
    model, args, kwargs = _call_factory(target)
    if dtype is not None:
        cast_weights(model, dtype)
        args, kwargs = tree_map(lambda leaf: _in_dtype(leaf, dtype), (args, kwargs))
    return (model, args, kwargs) if args or kwargs else with_example(model, dtype, sizes)


def with_example(model: nn.Module, dtype: torch.dtype | None, sizes: CallSizes | None) -> Built:
    """A transformer of diffusers in `dtype` and a call of it."""
    if dtype is not None:
        cast_weights(model, dtype)
    return model, (), example_call(model, 1, sizes).arguments


def analyse_without_data(build: Callable[[], Built], **options: Any) -> SamplerAnalysis:
    """`analyse_denoiser` of what `build` makes, on meta tensors, or, where the model refuses these, on fake ones."""
    with torch.device("meta"):
        model, args, kwargs = build()
        nn.Module.to(model, "meta").eval()  # what was made from a numpy array is on the CPU still
        args, kwargs = tree_map(_to_meta, (args, kwargs))
    try:
        return analyse_denoiser(model, args, kwargs, **options)
    except ValueError as error:
        if "meta" not in str(error):  # as autocast does, which some models ask for by the latent's device
            raise
    with fake_mode(), torch.device("cpu"):
        model, args, kwargs = build()
    return analyse_denoiser(model.eval(), args, kwargs, **options)


def _analyse(
    target: str, *, dtype: torch.dtype | None = None, sizes: CallSizes | None = None, **options: Any
) -> SamplerAnalysis:
    if options["n_steps"] < 1:
        raise ValueError(f"n_steps={options['n_steps']}; a schedule has at least one step.")
    try:
        return analyse_without_data(lambda: build_target(target, dtype, sizes), **options)
    except TypeError as error:
        raise ValueError(f"{target}: the model does not take the arguments of the example: {error}.") from error


def _call_factory(target: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    made = call_factory(target)
    if not isinstance(made.obj, nn.Module):
        raise ValueError(
            f"{target} returned {described(made.obj)}; it must return (model, args) or (model, args, kwargs), a "
            f"torch.nn.Module, a tuple and a dict."
        )
    return made


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """What a checkpoint holds to `dtype`, as loading one does, but for the modules that the class keeps in float32."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not tensor.is_floating_point() or not kept.isdisjoint(name.split(".")):
            continue
        if isinstance(tensor, nn.Parameter):
            tensor.data = tensor.data.to(dtype)
        else:  # which may be a view of a tensor that keeps its dtype
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, tensor.to(dtype))


def _to_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf


def _in_dtype(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _text(analysis: SamplerAnalysis) -> str:
    total = max(1, sum(count for count, _ in analysis.weights.values()))
    lines = [str(analysis.report), "  weights by when they are read last"]
    for time, (count, size) in analysis.weights.items():
        if count:
            lines.append(
                f"    {time:<13} {count:>15,} parameters ({count / total:6.1%}), {size / 2**30:7.2f} GiB: "
                f"{_MEANINGS[time]}"
            )
    return "\n".join(lines)


def _run(args: argparse.Namespace) -> int:
    try:
        roles = dict(_role(text) for text in args.roles)
        analysis = _analyse(
            args.target,
            n_steps=args.steps,
            exact=not args.batched,
            byte_budget=None if args.byte_budget is None else int(args.byte_budget * 2**20),
            roles=roles or None,
            dtype=DTYPES.get(args.dtype),
            sizes=CallSizes(args.batch, args.height, args.width, args.frames, args.text),
        )
    except ValueError as error:
        print(f"fusion-compile explain-sampler: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(analysis), indent=2) if args.json else _text(analysis))
    return 0


def _role(text: str) -> tuple[str, str]:
    name, equals, role = text.partition("=")
    if not equals:
        raise ValueError(f"--roles takes NAME=ROLE and got {text!r}.")
    return name, role
