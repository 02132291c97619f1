"""What a sampler did with a model's graph, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass

from fusion_compile.passes import Declined


@dataclass(frozen=True)
class SamplerReport:
    """One program of a sampler.

    `nodes`: calls of the whole graph by the earliest time their value is known. `body_nodes`: calls that are left in
    the loop, unpacking of the row included. `launches`: calls that start a kernel when run eagerly, before and after.
    `parameters`, `weight_bytes`: of the weights by the place where they are read last: "table", "prologue", "body".
    `table_bytes`: of one schedule and one request. `measured_difference`: see `ConditioningTable`.
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

    def __str__(self) -> str:
        total = sum(self.nodes.values())
        hoisted = self.parameters["table"] + self.parameters["prologue"]
        everything = max(1, hoisted + self.parameters["body"])
        lines = [
            f"sampler of {self.model}, {self.n_steps} steps, mode {self.mode!r}, "
            f"{'exact' if self.exact else 'batched'}",
            f"  inputs      {'; '.join(self.inputs)}",
            f"  roles       {self.roles}",
            "  calls       " + ", ".join(f"{name} {count}" for name, count in self.nodes.items()),
            f"  hoisted     {total} calls -> {self.body_nodes} in the loop; kernels when run eagerly "
            f"{self.launches[0]} -> {self.launches[1]}",
            f"  table       {self.residuals} values in packed rows, {_mebibytes(self.table_bytes)} for one request; "
            f"budget {self.byte_budget}",
        ]
        for place, meaning in _PLACES.items():
            share = self.parameters[place] / everything
            lines.append(
                f"  {place:<11} {self.parameters[place]:,} parameters ({share:.1%}), "
                f"{_mebibytes(self.weight_bytes[place])}: {meaning}"
            )
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
}


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
