"""Reports on a sampler and its programs, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from fusion_compile._notebook import preformatted
from fusion_compile.passes import Declined

RowKind = Literal["exact", "batched", "approximate"]
"""How the conditioning is computed: `Exact`, `Batched`, `Rank`."""


@dataclass(frozen=True)
class RankReport:
    """What rank conditioning did.

    `layers`: how many linear layers were factored; they read `factor_bytes` instead of `weight_bytes`. `low`, `high`:
    the timesteps that they are right for. `measured_difference`: see `RankConditioning.report`.
    """

    rank: int
    layers: int
    weight_bytes: int
    factor_bytes: int
    low: float
    high: float
    measured_difference: float | None

    def __str__(self) -> str:
        measured = "not measured yet"
        if self.measured_difference is not None:
            measured = f"each within {self.measured_difference:.2g} of its norm between the samples"
        return (
            f"{self.rank}: {self.layers} layers read {_mebibytes(self.factor_bytes)} of factors, not "
            f"{_mebibytes(self.weight_bytes)} of weights; t in [{self.low:g}, {self.high:g}], {measured}"
        )


@dataclass(frozen=True)
class ProgramReport:
    """What was hoisted and declined in one program of a sampler, which serves one combination of shapes.

    Attributes:
        model: Class of the model.
        inputs: The call's tensors: argument, dtype, shape and device.
        roles: Argument = role, and which roles were guessed.
        n_steps: Steps of the schedule that the table's bytes are counted for.
        mode: As resolved for the device, or "not compiled".
        rows: "exact", "batched" or "approximate", by the sampler's `conditioning`.
        nodes: Calls of the whole graph by the earliest time their value is known.
        body_nodes: Calls that are left in the loop.
        launches: Calls that start a kernel when run eagerly, before and after.
        parameters: Number of parameters by the place that reads them last: "table", "prologue", "body", or "unread".
        weight_bytes: Their bytes, by the same places.
        residuals: Values that the body reads from packed rows.
        table_bytes: Of one schedule and one request.
        byte_budget: "automatic", or the limit that was given.
        declined: Early values that the loop computes itself, and why.
        measured_difference: The largest absolute difference between rows computed in one batch and rows computed one
            at a time; None unless rows are batched.
        released: Bytes given back by `release_weights`.
        regions: How often the compiled body calls each block that it repeats; empty in ``mode="eager"``.
        replay: In modes that ask for CUDA graphs, that the body is one, or why it is not.
        rank: What rank conditioning did, or None.
    """

    model: str
    inputs: tuple[str, ...]
    roles: str
    n_steps: int
    mode: str
    rows: RowKind
    nodes: dict[str, int]
    body_nodes: int
    launches: tuple[int, int]
    parameters: dict[str, int]
    weight_bytes: dict[str, int]
    residuals: int
    table_bytes: int
    byte_budget: str
    declined: tuple[Declined, ...]
    measured_difference: float | None = None
    released: int = 0
    regions: dict[str, int] = field(default_factory=dict)
    replay: str = ""
    rank: RankReport | None = None

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        everything = max(1, sum(self.parameters.values()))
        lines = [
            f"sampler of {self.model}, {self.n_steps} steps, mode {self.mode!r}, {self.rows}",
            f"  inputs      {'; '.join(self.inputs)}",
            f"  roles       {self.roles}",
            "  calls       " + ", ".join(f"{name} {count}" for name, count in self.nodes.items()),
            f"  hoisted     {total} calls -> {self.body_nodes} in the loop; kernels when run eagerly "
            f"{self.launches[0]} -> {self.launches[1]}",
            f"  table       {self.residuals} values in packed rows, {_mebibytes(self.table_bytes)} for one request; "
            f"budget {self.byte_budget}",
        ]
        for place, meaning in _PLACES.items():
            if place == "unread" and not self.parameters[place]:
                continue
            share = self.parameters[place] / everything
            lines.append(
                f"  {place:<11} {self.parameters[place]:,} parameters ({share:.1%}), "
                f"{_mebibytes(self.weight_bytes[place])}: {meaning}"
            )
        if self.rank is not None:
            lines.append(f"  rank        {self.rank}")
        if self.regions:
            counts = ", ".join(map(str, self.regions.values()))
            lines.append(f"  repeated    {len(self.regions)} blocks compiled once each, called {counts} times a step")
        if self.replay:
            lines.append(f"  replay      {self.replay}")
        if self.measured_difference is not None:
            lines.append(f"  difference  batched rows are within {self.measured_difference:.3g} of single steps")
        if self.released:
            lines.append(f"  released    {_mebibytes(self.released)}")
        lines += [f"  declined    {d.node}: {d.reason}" for d in self.declined] or ["  declined    nothing"]
        return "\n".join(lines)


@dataclass(frozen=True)
class SamplerReport:
    """What a sampler hoisted and declined; ``print(sampler.report)`` shows it.

    Attributes:
        model: Class of the model.
        n_steps: Steps that the sampler was made for.
        programs: A report for each combination of shapes seen lately, the one used last at the end; empty before the
            first call.

    Example:
        >>> import torch, fusion_compile as fc
        >>> class Model(torch.nn.Module):
        ...     def forward(self, x, t):
        ...         return x * t[:, None]
        >>> print(fc.optimize_sampler(Model().eval(), 4, mode="eager").report)
        sampler of Model, 4 steps: not called yet, nothing is known
    """

    model: str
    n_steps: int
    programs: tuple[ProgramReport, ...]

    def _repr_html_(self) -> str:
        return preformatted(str(self))

    def __str__(self) -> str:
        unseen = f"sampler of {self.model}, {self.n_steps} steps: not called yet, nothing is known"
        return "\n".join(map(str, self.programs)) or unseen


_PLACES = {
    "table": "read once per schedule",
    "prologue": "read once per request",
    "body": "read at every step",
    "unread": "by nothing that the output depends on",
}


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
