"""``python -m fusion_compile._gpu_program.command MODULE:FACTORY TARGET``: the kernels that a GPU would launch.

A process of its own, because it makes torch believe in a GPU and compiles nothing for the machine that it runs on.
`fusion-compile explain … --target` starts it and shows what it prints.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx

from fusion_compile import _compat
from fusion_compile._factory import call_factory
from fusion_compile._gpu_program._compat import H100, captured_for, generate, why_not
from fusion_compile._gpu_program.generated import Generated, Launch
from fusion_compile._gpu_program.moved import in_aten
from fusion_compile._gpu_program.objections import objections

TARGETS = {"h100": H100}
"""By the name that ``--target`` takes."""
_MOST_KERNELS = 12


class Kept(NamedTuple):
    """A captured graph, and whether gradients were enabled where it begins."""

    graph: fx.GraphModule
    gradients: bool


@contextlib.contextmanager
def kept_instead_of_compiled() -> Iterator[list[Kept]]:
    """Inside, what this package would compile is kept and run as it was captured."""
    kept: list[Kept] = []
    with mock.patch.object(_compat, "backend_for", lambda backend, mode: _keeping(kept)):
        yield kept


def _keeping(kept: list[Kept]) -> Callable[..., Any]:
    def keep(graph: fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        kept.append(Kept(graph, torch.is_grad_enabled()))
        return graph.forward

    return keep


def capture(made: Any, args: Sequence[Any], kwargs: Mapping[str, Any], kept: list[Kept]) -> None:
    """Let what a factory made capture its programs into `kept`. A step or sampler that it has called already has."""
    if kept or not (args or kwargs):
        return
    made(*args, **kwargs)
    if not kept:  # of no kind that this package compiles
        compiled: Any = torch.compile(made, backend=_keeping(kept))
        compiled(*args, **kwargs)


def said(number: int, found: Generated) -> str:
    """Launches and bytes by region, what keeps the program from being one CUDA graph, and the largest kernels."""
    lines = [f"program {number}: {len(found.launches)} launches, {_megabytes(found.launches)} MB"]
    regions = dict.fromkeys(launch.region for launch in found.launches)
    for region in regions:
        launches = [launch for launch in found.launches if launch.region == region]
        kinds = Counter(launch.kind for launch in launches)
        lines.append(
            f"  {region:<10} {kinds['extern']:>4} of libraries + {kinds['triton']:<4} of Triton, "
            f"{_megabytes(launches):>9} MB"
        )
    lines += [f"  not one CUDA graph: {objection}" for objection in objections(found, batch=None)]
    largest = sorted(found.launches, key=lambda launch: -launch.moved)[:_MOST_KERNELS]
    lines += [f"  {launch.moved / 1e6:>9.3f} MB  {launch.region:<10} {launch.name}" for launch in largest]
    return "\n".join(lines)


def _megabytes(launches: Sequence[Launch]) -> str:
    return f"{sum(launch.moved for launch in launches) / 1e6:.3f}"


def main(words: Sequence[str]) -> int:
    """Print the programs of a factory as a GPU would run them; 2 after one sentence if that cannot be done."""
    factory, target = words
    if reason := why_not():
        print(reason, file=sys.stderr)
        return 2
    gpu = TARGETS[target]
    with captured_for(gpu), kept_instead_of_compiled() as kept:
        made, args, kwargs, _ = call_factory(factory)
        capture(made, args, kwargs, kept)
    if not kept:
        print(
            f"{factory} compiled nothing that could be written for a GPU: call the step or the sampler in the factory, "
            f"or return the inputs of a call with it.",
            file=sys.stderr,
        )
        return 2
    print(f"what Inductor writes for an {gpu.name}, seen without one:")
    for i, (graph, gradients) in enumerate(kept):
        print(said(i, generate(in_aten(graph, gradients=gradients), gpu=gpu)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
