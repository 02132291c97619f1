"""The tables of ``python -m fusion_compile.scaling``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fusion_compile._scaling.cost import Cost, Machine, cost, memory, samples_worth
from fusion_compile._scaling.models import MODELS, Model, dit


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(
        prog="python -m fusion_compile.scaling",
        description="Compare what a training step of a model costs on more and more GPUs, by bytes that travel and by "
        "Newton-Schulz, replicated or divided. These are sums, not measurements.",
    )
    made.add_argument("--model", default="dit-xl", metavar="NAME", help=f"{', '.join(MODELS)} (dit-xl)")
    made.add_argument("--hidden", type=int, metavar="N", help="a DiT of this width instead of a named model")
    made.add_argument("--depth", type=int, metavar="N", help="its number of blocks")
    made.add_argument("--tokens", type=int, metavar="N", help="tokens a sample, in place of the model's")
    made.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 256, 1024], metavar="N", help="8 64 256 1024")
    made.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="of one GPU, each way (50)")
    made.add_argument("--tflops", type=float, default=350.0, metavar="T", help="that matrix products reach (350)")
    made.add_argument("--batch", type=int, default=32, metavar="N", help="samples a GPU (32)")
    made.add_argument("--gradient-bytes", type=int, default=4, choices=(2, 4), help="of a gradient that travels (4)")
    return made


def run(arguments: Sequence[str] | None) -> int:
    """Print the tables; 2 after one sentence on standard error for a request that cannot be served."""
    asked = parser().parse_args(arguments)
    try:
        model = _model(asked)
        _check(asked)
    except ValueError as error:
        print(f"{parser().prog}: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    rows = [(Machine(n, asked.bandwidth, asked.tflops), n) for n in asked.gpus]
    costs = [(n, cost(model, at, batch=asked.batch, gradient_bytes=asked.gradient_bytes)) for at, n in rows]
    console.print(_heading(model), soft_wrap=True)
    console.print(_times(costs))
    console.print(_memory(model, asked.gpus))
    for line in _assumptions(asked):
        console.print(line, soft_wrap=True)
    return 0


def _model(asked: argparse.Namespace) -> Model:
    if (asked.hidden is None) is not (asked.depth is None):
        raise ValueError("--hidden and --depth belong together; give both.")
    if asked.hidden is not None:
        model = dit(f"a DiT of width {asked.hidden}", asked.hidden, asked.depth)
    elif asked.model in MODELS:
        model = MODELS[asked.model]
    else:
        raise ValueError(
            f"--model {asked.model} is not known; use one of {', '.join(MODELS)}, or --hidden and --depth."
        )
    return model if asked.tokens is None else model._replace(tokens=asked.tokens)


def _check(asked: argparse.Namespace) -> None:
    numbers = {
        "--hidden": asked.hidden, "--depth": asked.depth, "--tokens": asked.tokens, "--bandwidth": asked.bandwidth,
        "--tflops": asked.tflops, "--batch": asked.batch,
    } | {f"--gpus {n}": n for n in asked.gpus}  # fmt: skip
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value:g}; give a number above 0.")


def _heading(model: Model) -> str:
    return (
        f"{model.name}: {model.entries / 1e9:.3f} B entries in {len(model.matrices)} matrices. Newton-Schulz of all "
        f"costs as much as forward and backward of {samples_worth(model):.0f} samples of {model.tokens} tokens."
    )


def _times(costs: Sequence[tuple[int, Cost]]) -> Table:
    table = Table(title="milliseconds a step, one after the other", title_justify="left", box=None, pad_edge=False)
    heads = ("GPUs", "fwd+bwd", "all-reduce", "ZeRO-1", "FSDP", "rows to owners", "NS everywhere", "NS owned")
    for head in heads:
        table.add_column(head, justify="right")
    for n, c in costs:
        found = (c.compute, c.all_reduce, c.divided, c.sharded, c.rows, c.everywhere, c.owned)
        table.add_row(str(n), *map(_short, found))
    return table


def _memory(model: Model, gpus: Sequence[int]) -> Table:
    title = "GB a GPU without activations, SF-NorMuon on bf16 weights"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for head in ("GPUs", "replicated", "ZeRO-1", "FSDP"):
        table.add_column(head, justify="right")
    for n in gpus:
        table.add_row(str(n), *map(_short, memory(model, n)))
    return table


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _assumptions(asked: argparse.Namespace) -> list[str]:
    return [
        f"Assumed: {asked.bandwidth:g} GB/s a GPU and direction, rings; {asked.tflops:g} TFLOP/s in every product; "
        f"{asked.batch} samples a GPU; gradients travel in {asked.gradient_bytes} bytes, weights in 2.",
        "all-reduce: 2·N·b·(W-1)/W bytes. ZeRO-1: gradients scattered, weights gathered. FSDP: weights gathered twice.",
        "rows to owners: row shards to whole matrices and back, 2·(N/W)·b·(W-1)/W bytes (fully_shard models).",
        "NS: 5 (4 l s² + 2 s³) operations a matrix. owned: the busiest rank; never less than the largest matrix.",
        "Left out: latency, overlap, contention, embeddings, vectors, activations. These rank choices; they are no "
        "forecast.",
    ]
