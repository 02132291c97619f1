"""The highest point of memory of a step: predicted before the program runs, and measured.

    python benchmarks/predicted_memory.py [--only GPT,bf16] [--json predicted.json]

Predicted is what `explain` says. Measured is what torch's allocator gave out in a step, from the profiler's record,
beside what is kept between steps. Both are bytes, and do not depend on the machine's load. Kernels are taken out, so
that no C++ is compiled: what is allocated does not depend on what they write. On a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["FUSION_COMPILE_PROGRESS"] = "0"
HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "examples", HERE.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from _measure import machine, peak_of_call, print_machine, print_table, write_json  # noqa: E402
from _training_loops import build, images, loss_drawing_noise  # noqa: E402
from dit import DiT, dit_s_2  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import fusion_compile as fc  # noqa: E402
from fusion_compile._program.kernel_sources import _compat as kernels  # noqa: E402
from fusion_compile._step import captures  # noqa: E402
from fusion_compile._step.proof import Compared  # noqa: E402
from fusion_compile.explain._subjects.step_memory import bytes_of  # noqa: E402

CPU = torch.device("cpu")


class Case(NamedTuple):
    """A model in training mode, its loss, a batch, and the step's options."""

    model: nn.Module
    loss: Callable[..., Tensor]
    batch: tuple[Tensor, ...]
    options: dict[str, Any]


def digits(batch: int, depth: int = 4, *, checkpointed: bool = False, **options: Any) -> Case:
    model = build(lambda: DiT(8, 2, 1, hidden_size=128, depth=depth, num_heads=4), CPU)
    for block in model.blocks if checkpointed else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return Case(model, loss_drawing_noise, images(model, batch, CPU), options)


class Block(nn.Module):
    """A layer of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = self.qkv(self.before(x)).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape))
        y: Tensor = x + self.mlp(self.between(x))
        return y


class GPT(nn.Module):
    """GPT-2 of a few layers, the embedding tied to the head."""

    def __init__(self, tokens: int = 1024, width: int = 128, depth: int = 4, length: int = 64) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])
        logits: Tensor = F.linear(self.norm(hidden), self.tokens.weight)
        return logits


def next_token(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def gpt() -> Case:
    return Case(GPT(), next_token, (torch.randint(1024, (8, 65)),), {"optimizer": "adamw", "clip_grad_norm": 1.0})


class Adapted(nn.Module):
    """A frozen layer, and a low-rank one beside it."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.base(x) + self.up(self.down(x)))


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()  # type: ignore[no-any-return]


def adapters() -> Case:
    model = nn.Sequential(*(Adapted(256, 8) for _ in range(12)))
    return Case(model, mean_square, (torch.randn(128, 256),), {"optimizer": "adamw"})


def half() -> Case:
    model = nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 128)).bfloat16()
    return Case(model, mean_square, (torch.randn(256, 128).bfloat16(),), {"optimizer": "adamw"})


def dit_s() -> Case:
    model = build(dit_s_2, CPU)
    return Case(model, loss_drawing_noise, images(model, 2, CPU), {"optimizer": "adamw"})


CASES: dict[str, Callable[[], Case]] = {
    "digits DiT, adamw, batch 32": lambda: digits(32, optimizer="adamw"),
    "digits DiT, adamw, batch 128": lambda: digits(128, optimizer="adamw"),
    "digits DiT, sf_normuon, batch 32": lambda: digits(32, optimizer="sf_normuon"),
    "digits DiT, sf_normuon, batch 128": lambda: digits(128, optimizer="sf_normuon"),
    "digits DiT, 6 checkpointed blocks, batch 64": lambda: digits(
        64, 6, checkpointed=True, optimizer="adamw", capture="run", rehearse=True
    ),
    "GPT-2, 4 layers of width 128, 8 x 64 tokens": gpt,
    "12 frozen layers with adapters of rank 8": adapters,
    "bf16 weights, an MLP": half,
    "DiT-S/2, batch 2": dit_s,
}


class Row(NamedTuple):
    """Bytes at the highest point, predicted and measured; seconds of CPU that the prediction took."""

    predicted: int
    measured: int
    kept: int
    seconds: float


def without_kernels() -> None:
    """From now on Inductor's kernels do nothing, no C++ is compiled, and no step is compared with the ordinary one."""
    torch._inductor.config.force_disable_caches = True
    replaced: Any = kernels
    replaced._compiled = lambda compiler, cache, wanted: [lambda *given: None for _ in wanted]
    replaced = captures
    replaced.take_compared = lambda state, proof, run, *rest, **named: Compared(run())


def row(case: Case) -> Row:
    model, batch = case.model, case.batch
    step = fc.compile_training_step(model, case.loss, mode="default", **{"rehearse": False, **case.options})
    step(*batch)
    begin = time.process_time()
    peak = step.programs[-1].schedule.peak()
    seconds = time.process_time() - begin
    if peak is None:
        raise RuntimeError("the highest point of memory is not predicted.")
    kept = [*step._state.values(), *model.parameters(), *model.buffers()]
    measured = peak_of_call(lambda: step(*batch), CPU, lambda: [])
    held = bytes_of(kept)
    return Row(held + peak.bytes, held + measured, held, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="parts of names, with commas")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    without_kernels()
    facts = machine(CPU)
    print_machine(facts)
    wanted = [name for name in CASES if any(part in name for part in arguments.only.split(","))]
    rows = {}
    for name in wanted:
        rows[name] = row(CASES[name]())
        print(name, rows[name], flush=True)
    print_table(
        "MiB at the highest point of a step",
        ("program", "predicted", "measured", "ratio", "of it kept", "CPU seconds"),
        [
            (
                n,
                *(f"{b / 2**20:.2f}" for b in r[:2]),
                f"{r.predicted / r.measured:.3f}",
                f"{r.kept / 2**20:.2f}",
                f"{r.seconds:.2f}",
            )
            for n, r in rows.items()
        ],
    )
    if arguments.json:
        write_json(arguments.json, {"machine": facts, "bytes": {n: r._asdict() for n, r in rows.items()}})


if __name__ == "__main__":
    main()
