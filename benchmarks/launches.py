"""Launches and bytes of a training step on an H100 by region, ours and the ordinary loop's, counted without a GPU.

    PYTHONPATH=.cuda-codegen/triton-3.7.1 python benchmarks/launches.py [--models small,dit_s_2] [--json FILE]

Ours is one program with the loss, its noise and the update in it. The ordinary loop is ``torch.compile(model)``, the
loss outside and ``AdamW(fused=True)``; its loss, noise and optimizer are counted too. Both are written by Inductor for
an H100 in mode ``max-autotune`` with products by cuBLAS. Bytes are those that the launches read and write if each
touches every entry once. These are counts: nothing is timed. ``make cuda-codegen`` installs the Triton that it needs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "examples", HERE.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from _peer_launches import adamw_launches, loss_launches, model_launches  # noqa: E402
from _training_loops import MODELS, build, images, in_bfloat16, loss_drawing_noise  # noqa: E402

import fusion_compile as fc  # noqa: E402
from fusion_compile._gpu_program._compat import H100, captured_for, generate, why_not  # noqa: E402
from fusion_compile._gpu_program.generated import Launch  # noqa: E402
from fusion_compile._gpu_program.moved import in_aten  # noqa: E402
from fusion_compile.explain._graph.roofline import ROOFLINES  # noqa: E402
from fusion_compile.optim.recipes import RECIPES  # noqa: E402

REGIONS = ("forward", "backward", "optimizer")
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    """Launches and bytes of one step by region. `bound`: milliseconds that an H100 needs at least by explain's
    table, operator by operator, which counts no fusion; 0 where nothing was explained."""

    model: str
    step: str
    launches: dict[str, int]
    moved: dict[str, int]
    bound: float = 0.0

    @property
    def milliseconds(self) -> float:
        """Least time for the bytes at the H100's peak."""
        return 1e3 * sum(self.moved.values()) / ROOFLINES["h100"].bandwidth


def row(model: str, step: str, launches: Sequence[Launch], bound: float = 0.0) -> Row:
    counts, moved = Counter[str](), Counter[str]()
    for launch in launches:
        region = launch.region if launch.region in REGIONS else "optimizer"  # what is written back after the update
        counts[region] += 1
        moved[region] += launch.moved
    return Row(model, step, {r: counts[r] for r in REGIONS}, {r: moved[r] for r in REGIONS}, bound)


def ours(name: str, recipe: str, size: int, bf16: bool) -> Row:
    model = build(MODELS[name], CPU)
    loss = in_bfloat16(loss_drawing_noise) if bf16 else loss_drawing_noise
    step = fc.compile_training_step(model, loss, optimizer=recipe, backend="eager")
    with captured_for(H100):
        step(*images(model, size, CPU))
    program = step.programs[-1]
    found = generate(program.graph if program.captured_by == "run" else in_aten(program.graph))
    regions = fc.explain(step, device="h100").graphs[0].regions
    return row(name, recipe, found.launches, sum(region.microseconds for region in regions) / 1e3)


def peers(name: str, size: int, bf16: bool) -> Row:
    model = build(MODELS[name], CPU)
    x, y = images(model, size, CPU)
    loss = in_bfloat16(loss_drawing_noise) if bf16 else loss_drawing_noise
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        compiled = model_launches(model, (x, torch.rand(size), y))
    return row(name, "torch.compile", compiled + loss_launches(loss, (x, y)) + adamw_launches(model))


def table(rows: Sequence[Row]) -> str:
    head = "| model | step | forward | backward | update | launches | MB | ms for the bytes | ms, unfused |\n"
    lines = [head + "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        cells = [f"{r.launches[region]}" for region in REGIONS]
        bound = f"{r.bound:.2f}" if r.bound else ""
        numbers = [
            *cells,
            sum(r.launches.values()),
            f"{sum(r.moved.values()) / 1e6:.0f}",
            f"{r.milliseconds:.2f}",
            bound,
        ]
        lines.append(f"| {r.model} | `{r.step}` | " + " | ".join(map(str, numbers)) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="small,dit_s_2,dit_b_2", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--recipes", default="adamw,sf_normuon")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    if reason := why_not():
        print(f"launches.py: {reason}", file=sys.stderr)
        return 2
    for what, given, known in (("--models", asked.models, MODELS), ("--recipes", asked.recipes, RECIPES)):
        if unknown := sorted(set(given.split(",")) - set(known)):
            print(f"launches.py: {what} {', '.join(unknown)} is not known; use {', '.join(known)}.", file=sys.stderr)
            return 2
    rows: list[Row] = []
    for model in asked.models.split(","):
        rows.append(peers(model, asked.batch, asked.bf16))
        print(rows[-1], file=sys.stderr, flush=True)
        for recipe in asked.recipes.split(","):
            rows.append(ours(model, recipe, asked.batch, asked.bf16))
            print(rows[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if asked.json:
        asked.json.write_text(json.dumps([asdict(r) for r in rows], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
