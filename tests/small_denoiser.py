"""A denoiser small enough to be exported in a blink, samplers of it, and what tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._sampler.program import SamplerProgram
from fusion_compile._sampler.table.learned_rows import LearnedRows
from fusion_compile._sampler.table.trajectory_watch import TrajectoryWatch
from fusion_compile.sampler import Sampler, optimize_sampler

X, Y, NULL = torch.randn(2, 4), torch.tensor([1, 2]), torch.tensor([0, 0])


class Denoiser(nn.Module):
    """Modulation from a timestep of any dtype, for each sample or for each token, and a label."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = nn.Linear(2, 8), nn.Embedding(5, 8)
        self.modulation, self.out = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        t = timestep.to(x.dtype).unsqueeze(-1)
        c = self.time(torch.cat([t.cos(), t.sin()], -1))
        c = c + (self.label(y) if c.dim() < 3 else self.label(y)[:, None])
        shift, scale = self.modulation(nn.functional.silu(c)).chunk(2, -1)
        out: Tensor = self.out(x) * (1 + scale) + shift
        return out


class Scalar(nn.Module):
    """One timestep, without a batch, and nothing wide enough to be factored."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale: Tensor = self.scale(t.reshape(1))
        return x * scale


def denoiser() -> Denoiser:
    model = Denoiser()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model.eval()


def make(n_steps: int = 4, **options: object) -> Sampler:
    return optimize_sampler(denoiser(), n_steps, mode="eager", **options)  # type: ignore[arg-type]


def exactly(sampler: Sampler, t: Tensor | float, y: Tensor = Y, x: Tensor = X) -> bool:
    t = t if isinstance(t, Tensor) else torch.full((len(x),), t)
    with torch.no_grad():
        return torch.equal(sampler(x, t, y), sampler.model(x, t, y))


def program_of(sampler: Sampler) -> SamplerProgram:
    (program,) = sampler._programs.values()
    return program


class Counter:
    """Counts how often a stage of a program's table ran."""

    def __init__(self, sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: dict[str, int] = {}
        for time, stage in program_of(sampler).table._stages.items():
            monkeypatch.setattr(stage, "_run", self._counting(time.name, stage._run))

    def _counting(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.ran[name] = self.ran.get(name, 0) + 1
            return run(*args)

        return counted

    def taken(self) -> dict[str, int]:
        """What ran since the last time."""
        ran, self.ran = self.ran, {}
        return ran


def rows_of(sampler: Sampler) -> LearnedRows:
    rows = program_of(sampler).rows
    assert isinstance(rows, LearnedRows)
    return rows


def without_free_looks(sampler: Sampler) -> TrajectoryWatch:
    """The rule of a GPU, on a CPU."""
    watch = rows_of(sampler).trajectories
    watch._look_always = sampler._options.verify == "always"
    return watch


TIMES = (8.0, 7.0, 6.0, 5.0)


def trusted(verify: str = "trajectory", **options: object) -> Sampler:
    """A sampler that has seen two schedules without an unknown timestep after the one in which it learned."""
    sampler = make(4, verify=verify, **options)
    assert exactly(sampler, TIMES[0])
    without_free_looks(sampler)
    for t in [*TIMES, *TIMES, *TIMES]:
        assert exactly(sampler, t)
    return sampler
