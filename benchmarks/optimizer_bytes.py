"""Bytes of state a parameter of every recipe and codec, counted from the tensors that a step allocates.

    python benchmarks/optimizer_bytes.py [--check]

Writes the table of docs/optimizers.md; with ``--check`` it says whether the page has it. Two sets: factors of adapters
(16 × 640 and 640 × 16, where scales and rows weigh most) and one block of DiT-S (vectors included). Their ratios are
those of larger sets, for everything is kept by parameter. Beside them what the sources of the recipes take on such sets
(K-Optimizers 0.7.4, KempnerForge 5666d0d, prodigyopt 1.1.2, torch 2.13), counted in the same way.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile.optim import Transform

PAGE = Path(__file__).parents[1] / "docs/optimizers.md"
BEGIN, END = "<!-- written by python benchmarks/optimizer_bytes.py: begin -->", "<!-- end of the table of bytes -->"
Shapes = list[tuple[int, ...]]
ADAPTERS: Shapes = [(16, 640), (640, 16)] * 4
DIT: Shapes = [
    *((1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,), (2304, 384), (2304,)),
]


class Row(NamedTuple):
    """`shown`: how a user writes it. `theirs`: bytes of the source on adapters and on DiT; None where it has no such
    dial. `half_precision`: of bf16 weights, whose bytes then count too."""

    shown: str
    make: Callable[[], Transform]
    theirs: tuple[float, float] | None = None
    half_precision: str | None = None


def _sf_factored() -> Transform:
    base = optim.chain(optim.scale_by_factored_rms(), optim.scale_by_learning_rate(2.5e-3))
    return optim.stored(optim.schedule_free(base, 2.5e-3), z="bf16")


_of = functools.partial
ROWS = (
    Row("adamw()", optim.adamw, (8.0, 8.0)),
    Row('adamw(momentum="int8", second_moment="int8")', _of(optim.adamw, momentum="int8", second_moment="int8")),
    Row("adafactor()", optim.adafactor, (0.257, 0.023)),
    Row("adakaon(betas=(0, 0.999))", _of(optim.adakaon, betas=(0, 0.999)), (0.256, 0.022)),
    Row('adakaon(momentum="4bit")', _of(optim.adakaon, momentum="4bit"), (0.787, 0.553)),
    Row('adakaon(momentum="int8")', _of(optim.adakaon, momentum="int8"), (1.384, 1.031)),
    Row("adakaon()", optim.adakaon, (2.256, 2.022)),
    Row('adakaon(momentum="fp32")', _of(optim.adakaon, momentum="fp32"), (4.256, 4.022)),
    Row("nekaon()", optim.nekaon, (0.787, 0.553)),
    Row('nekaon(momentum="bf16")', _of(optim.nekaon, momentum="bf16"), (2.256, 2.022)),
    Row('adamuon(momentum="int8")', _of(optim.adamuon, momentum="int8"), (1.384, 1.031)),
    Row("adamuon()", optim.adamuon, (2.256, 2.022)),
    Row('adapnm(momentum="int8")', _of(optim.adapnm, momentum="int8"), (2.513, 2.062)),
    Row("adapnm()", optim.adapnm, (4.256, 4.022)),
    Row('lion(momentum="4bit")', _of(optim.lion, momentum="4bit"), (0.531, 0.531)),
    Row('lion(momentum="int8")', _of(optim.lion, momentum="int8"), (1.128, 1.009)),
    Row('lion(momentum="bf16")', _of(optim.lion, momentum="bf16"), (2.0, 2.0)),
    Row("lion()", optim.lion, (4.0, 4.0)),
    Row("prodigy()", optim.prodigy, (16.0, 16.0)),
    Row('prodigy(momentum="bf16")', _of(optim.prodigy, momentum="bf16"), (14.0, 14.0)),
    Row(
        'prodigy(slice_p=11, momentum="int8", second_moment="factored")',
        _of(optim.prodigy, slice_p=11, momentum="int8", second_moment="factored"),
        (2.112, 1.758),
    ),
    Row(
        'prodigy(slice_p=11, momentum="4bit", second_moment="factored")',
        _of(optim.prodigy, slice_p=11, momentum="4bit", second_moment="factored"),
    ),
    Row("autokaon()", optim.autokaon),
    Row("autokaon(scale=1e-3)", _of(optim.autokaon, scale=1e-3), (0.256, 0.022)),
    *(
        Row(f'{name}(momentum="int8", second_moment="int8")', _of(make, momentum="int8", second_moment="int8"), most)
        for name, make, most in (
            ("adopt", optim.adopt, (2.256, 2.022)),
            ("adabelief", optim.adabelief, (2.256, 2.022)),
            ("adamp", optim.adamp, (2.256, 2.022)),
        )
    ),
    Row("kempner_muon()", optim.kempner_muon, (8.0, 4.010)),
    Row("kempner_sf_adamw()", optim.kempner_sf_adamw, (12.0, 12.0)),
    Row("sf_adamw()", optim.sf_adamw, (8.0, 8.0)),
    Row('Schedule-Free over scale_by_factored_rms, z="bf16"', _sf_factored, (2.256, 2.022)),
    Row(
        'normuon(momentum="int8", second_moment="int8"), bf16 weights, stochastic',
        _of(optim.normuon, momentum="int8", second_moment="int8"),
        None,
        "stochastic",
    ),
    Row(
        'normuon(momentum="int8", second_moment="int8"), bf16 weights, exact',
        _of(optim.normuon, momentum="int8", second_moment="int8"),
        None,
        "exact",
    ),
    Row('lion(momentum="int8"), bf16 weights, stochastic', _of(optim.lion, momentum="int8"), None, "stochastic"),
    Row('lion(momentum="int8"), bf16 weights, exact', _of(optim.lion, momentum="int8"), None, "exact"),
)


def bytes_a_parameter(row: Row, shapes: Shapes) -> float:
    """What a training step allocates for `row`, by parameter of `shapes`."""
    dtype = torch.float32 if row.half_precision is None else torch.bfloat16
    model = nn.Module()
    for i, shape in enumerate(shapes):
        model.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def loss(model: nn.Module) -> Tensor:
        return torch.stack([p.float().square().sum() for p in model.parameters()]).sum()

    half_precision = row.half_precision or "master"
    step = fc.compile_training_step(model, loss, optimizer=row.make(), mode="eager", half_precision=half_precision)
    counted = ("optimizer",) if row.half_precision is None else ("optimizer", "params", "module", "mantissa")
    held = sum(t.nbytes for key, t in step._state.items() if key.split("/")[0] in counted)
    return held / sum(p.numel() for p in model.parameters())


def table() -> str:
    """The table in Markdown."""
    lines = ["| recipe | adapters | DiT-S | its source: adapters, DiT-S |", "|---|---|---|---|"]
    for row in ROWS:
        found = [bytes_a_parameter(row, shapes) for shapes in (ADAPTERS, DIT)]
        theirs = "" if row.theirs is None else f"{row.theirs[0]:.2f}, {row.theirs[1]:.2f}"
        lines.append(f"| `{row.shown}` | {found[0]:.2f} | {found[1]:.2f} | {theirs} |")
    return "\n".join(lines)


def put_into(page: str, written: str) -> str:
    """`page` with `written` between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{written}\n\n{END}{after}"


def main() -> int:
    """Write the table, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    page = PAGE.read_text(encoding="utf-8")
    wanted = put_into(page, table())
    if parser.parse_args().check:
        print("the page has the table" if page == wanted else "the page lacks the table: run without --check")
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
