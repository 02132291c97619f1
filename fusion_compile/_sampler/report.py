"""What a sampler did with a model's graph, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_compile.passes import Declined


@dataclass(frozen=True)
class RankReport:
    """What was factored: `layers` that read `factor_bytes` instead of `weight_bytes`, right for timesteps from `low` to
    `high`. `measured_difference`: see `RankConditioning`."""

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
class SamplerReport:
    """One program of a sampler.

    `nodes`: calls of the whole graph by the earliest time their value is known. `body_nodes`: calls that are left in
    the loop. `launches`: calls that start a kernel when run eagerly, before and after.
    `parameters`, `weight_bytes`: of the weights by the place where they are read last: "table", "prologue", "body", or
    "unread" by any.
    `regions`: how often the compiled body calls each block that it repeats; empty in ``mode="eager"``. `replay`: in
    modes that ask for CUDA graphs, that the body is one, or why it is not. `table_bytes`: of one schedule and one
    request. `measured_difference`: see `ConditioningTable`. `rank`: in rank mode.
    """

    model: str
    inputs: tuple[str, ...]
    roles: str
    n_steps: int
    mode: str
    exact: bool
    nodes: dict[str, int]
    body_nodes: int
    launches: tuple[int, int]
    parameters: dict[str, int]
    weight_bytes: dict[str, int]
    residuals: int
    table_bytes: int
    byte_budget: str
    measured_difference: float | None
    released: int
    declined: tuple[Declined, ...]
    regions: dict[str, int] = field(default_factory=dict)
    replay: str = ""
    rank: RankReport | None = None

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        everything = max(1, sum(self.parameters.values()))
        lines = [
            f"sampler of {self.model}, {self.n_steps} steps, mode {self.mode!r}, "
            f"{'approximate' if self.rank else 'exact' if self.exact else 'batched'}",
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


_PLACES = {
    "table": "read once per schedule",
    "prologue": "read once per request",
    "body": "read at every step",
    "unread": "by nothing that the output depends on",
}


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
