"""``fusion-compile explain-sampler TARGET``: what a sampler of a model would do, without weights and without a GPU."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fusion_compile._sampler.conditioning import Batched, Exact
from fusion_compile._sampler.without_weights.analysis import SamplerAnalysis, analyse_without_data
from fusion_compile._sampler.without_weights.diffusers_arguments import CallSizes
from fusion_compile._sampler.without_weights.target import build_target

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    parser.add_argument(
        "--batched", action="store_true", help="rows of all steps in one batch, as conditioning=Batched()"
    )
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
    conditioning: Exact | Batched | None = None,
    byte_budget: int | None = None,
    roles: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    sizes: CallSizes | None = None,
) -> str:
    """The text of the report on `target`; `target`, `dtype` and `sizes` are those of `build_target`.

    Raises ValueError with a sentence for a model that cannot be found, built, called or exported.
    """
    options = {"n_steps": n_steps, "conditioning": conditioning, "byte_budget": byte_budget, "roles": roles}
    return str(_analyse(target, dtype, sizes, **options))


def _analyse(target: str, dtype: torch.dtype | None, sizes: CallSizes | None, **options: Any) -> SamplerAnalysis:
    try:
        return analyse_without_data(lambda: build_target(target, dtype, sizes), **options)
    except TypeError as error:
        raise ValueError(f"{target}: the model does not take the arguments of the example: {error}.") from error


def _run(args: argparse.Namespace) -> int:
    try:
        roles = dict(_role(text) for text in args.roles)
        analysis = _analyse(
            args.target,
            DTYPES.get(args.dtype),
            CallSizes(args.batch, args.height, args.width, args.frames, args.text),
            n_steps=args.steps,
            conditioning=Batched() if args.batched else Exact(),
            byte_budget=None if args.byte_budget is None else int(args.byte_budget * 2**20),
            roles=roles or None,
        )
    except ValueError as error:
        print(f"fusion-compile explain-sampler: {error}", file=sys.stderr)
        return 2
    print(json.dumps(dataclasses.asdict(analysis), indent=2) if args.json else analysis)
    return 0


def _role(text: str) -> tuple[str, str]:
    name, equals, role = text.partition("=")
    if not equals:
        raise ValueError(f"--roles takes NAME=ROLE and got {text!r}.")
    return name, role
