"""What every group of checks needs: device and sizes, a step to check, two states compared, one graph required."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import _cuda_graph_probe as probe
import torch
from _rows import Check
from _training_loops import build
from dit import DiT
from torch import Tensor, nn

import fusion_compile as fc

LIVE = ("lr", "scalar_lr", "weight_decay", "scalar_weight_decay", "beta", "momentum", "clip_grad_norm")
"""Hyperparameters that change at every step, those of them that a recipe has."""


@dataclass(frozen=True)
class Setting:
    """`dry`: on a CPU with tiny models, to see that every check runs. `mode`: of the capture checks."""

    device: torch.device
    dry: bool
    mode: str

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def options(self, recipe: str, mode: str | None = None) -> dict[str, Any]:
        """`mode` and `backend` of a step. A dry run captures AdamW's graph and leaves the others uncompiled."""
        if not self.dry:
            return {"mode": mode or self.mode}
        return {"backend": "aot_eager"} if recipe == "adamw" and mode is None else {"mode": "eager"}

    def model(self, **changes: Any) -> DiT:
        """A DiT-S/2 of four blocks without label dropout; dry, one of width 128, the least with spectral matrices."""
        shape: dict[str, Any]
        if self.dry:
            shape = {"input_size": 8, "hidden_size": 128, "depth": 1, "num_heads": 2, "mlp_ratio": 1.0}
        else:
            shape = {
                "input_size": 32,
                "in_channels": 4,
                "hidden_size": 384,
                "depth": 4,
                "num_heads": 6,
                "num_classes": 1000,
            }
        return build(lambda: DiT(**{**shape, "class_dropout_prob": 0.0, **changes}), self.device)

    def steps(self, many: int) -> int:
        return 4 if self.dry else many

    @property
    def batch_size(self) -> int:
        return 2 if self.dry else 32


def differing(a: Mapping[str, Any], b: Mapping[str, Any], ignore: tuple[str, ...] = ()) -> list[str]:
    """Names below which two nested states are not bitwise equal."""
    out = []
    for key in sorted(a.keys() | b.keys()):
        one, two = a.get(key), b.get(key)
        if key in ignore:
            continue
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            out += [f"{key}.{name}" for name in differing(one, two, ignore)]
        elif isinstance(one, Tensor) and isinstance(two, Tensor):
            same = one.shape == two.shape and one.dtype == two.dtype
            out += [] if same and torch.equal(bits(one), bits(two)) else [key]
        elif one != two:
            out.append(key)
    return out


def largest_gap(one: Tensor, two: Tensor) -> float:
    """The largest relative difference of two rows of losses."""
    return float(((one - two).abs() / two.abs()).max())


def bits(t: Tensor) -> Tensor:
    t = t.detach().cpu().contiguous().reshape(-1)
    return t.view(torch.uint8) if t.numel() else t


def hyperparameters_at(step: fc.TrainingStep, index: int) -> None:
    """Give every `LIVE` hyperparameter another value, a function of `index` alone."""
    for name in LIVE:
        if name not in step.hyperparameters:
            continue
        wave = 1 + 0.1 * math.sin(1 + index)
        if name == "clip_grad_norm":
            value = 2.0 * wave
        elif name in ("beta", "momentum"):
            value = 0.85 + 0.05 * wave
        elif "weight_decay" in name:
            value = 0.02 * wave
        else:
            value = 1e-3 * wave
        step.hyperparameters[name] = value


def build_training_step(
    setting: Setting, model: nn.Module, recipe: str, loss_fn: Any, mode: str | None = None, **arguments: Any
) -> fc.TrainingStep:
    """A step of `recipe`. `mode`: instead of the setting's. `arguments`: of the recipe or ``compile_training_step``."""
    of_recipe = {k: v for k, v in arguments.items() if k in inspect.signature(fc.optim.RECIPES[recipe]).parameters}
    of_step = {k: v for k, v in arguments.items() if k not in of_recipe}
    optimizer = fc.optim.RECIPES[recipe](**of_recipe)
    return fc.compile_training_step(model, loss_fn, optimizer=optimizer, **setting.options(recipe, mode), **of_step)


def require_one_graph(
    c: Check, step: fc.TrainingStep, seen: probe.Witness, replays: list[int], records: list[int]
) -> None:
    """`replays`, `records`: counted at each call of the step; the first compiles and warms up, the second records."""
    captured = step.mode != "eager"
    c.require(len(step.programs) == int(captured), f"{len(step.programs)} programs were captured, not one")
    skips = seen.counted("cudagraph_skips")
    c.require(skips == 0 or not c.on_gpu, f"Inductor left CUDA graphs alone {skips} times: {why(seen)}")
    pieces = [g.partitions for g in seen.compiled if g.partitions is not None]
    # What runs now and then is a program of its own, without a CUDA graph.
    expected = 1 + len(step.periodic_programs)
    c.require_on_gpu(len(seen.compiled) == expected, f"Inductor finished {len(seen.compiled)} graphs, not {expected}")
    c.require_on_gpu(set(pieces) <= {1}, f"the graph is cut into {pieces} CUDA graphs; {why(seen)}")
    c.require_on_gpu(not any(g.refusals for g in seen.compiled), why(seen))
    c.require_on_gpu(records[1] == 1, f"{records[1]} CUDA graphs were recorded at the second call, not one")
    again = [i for i, n in enumerate(records) if i > 1 and n]
    c.require_on_gpu(not again, f"recorded again at steps {again[:10]}")
    odd = [i for i, n in enumerate(replays) if i > 1 and n != 1]
    c.require_on_gpu(not odd, f"steps {odd[:10]} made {[replays[i] for i in odd[:10]]} replays, not one")
    forest = probe.trees(step.layout.device)
    if forest is not None:
        c.require(forest.graphs == 1, f"the tree manager holds {forest.graphs} recorded graphs, not one")
        c.note(f"tree: {forest.graphs} graph, {forest.failed_to_match} calls without a match")
    c.note(
        f"{len(replays)} steps, {sum(replays[2:])} replays, partitions {pieces or 'none told'}, "
        f"{seen.counted('cudagraph_recorded_non_static_inputs')} inputs copied per replay"
    )


def why(seen: probe.Witness) -> str:
    reasons = [reason for g in seen.compiled for reason in g.refusals]
    loose = [g.written_not_static for g in seen.compiled]
    return f"reasons told: {reasons or 'none'}; inputs written that are not static: {loose}"
