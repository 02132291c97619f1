"""Split a sampler's graph by binding time: what timestep and request decide leaves the denoising loop.

    before                                  after
    shift = linear(silu(t), w)              table, once per schedule:  shift = linear(silu(t), w) for every t
    label = embedding(y, e)                 prologue, once per request: label = embedding(y, e)
    return x * shift + label                body, at every step:        return x * shift + label

A diffusion transformer computes its modulation from the timestep (and perhaps a label), and then spends the rest of the
step on the latent. Everything that does not depend on the latent is known before the loop starts. This pass moves it
into *stages*, one for each earlier binding time, which run once per schedule or once per request. The *body* reads
their results as further inputs (residuals) and takes no timestep. A minimum cut (`_choose_residuals`) chooses which
values to keep: a value that costs more to keep than to compute stays in the body, and the report says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from ._choose_residuals import LEAST_SAVING, Choice, choose_residuals, everything_early, is_weight, rows
from ._cost import Exchange, exchange_rates
from ._dependence import BindingTime, binding_times, why_at_every_call
from ._graph import MAY_COPY, bytes_of, calls, format_node, is_static, is_view, op_name, tensor_of
from ._pass import Declined, PassReport

EARLY = (BindingTime.CONST, BindingTime.STEP, BindingTime.REQUEST, BindingTime.STEP_REQUEST)


@dataclass(frozen=True)
class Stage:
    """A graph of its own, ``graph_module(*inputs) -> tuple of outputs``; both are names of nodes of the whole graph."""

    graph_module: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Hoisted:
    """A graph split by binding time.

    Attributes:
        stages: For each early time, the values that later stages or the body read. Stages without outputs are left out.
        body: Takes weights, live inputs and residuals, and returns the whole graph's outputs.
        residuals: Name -> binding time, of each value that the body reads.
        node_times: How many calls of the whole graph are known at each time.
        report: What was moved and what was declined.
    """

    stages: dict[BindingTime, Stage]
    body: Stage
    residuals: dict[str, BindingTime]
    node_times: dict[BindingTime, int]
    report: PassReport


def hoist_time_conditioning(
    graph_module: fx.GraphModule,
    roles: Mapping[str, BindingTime],
    *,
    n_steps: int,
    byte_budget: int | None = None,
    exchange: Exchange | None = None,
) -> Hoisted:
    """Split `graph_module`, which is left as it was.

    Exact. Run `drop_metadata_reads` first. Declined are values that cost more to keep than to compute, values that do
    not fit the budget, random and in-place operators, and values whose size depends on data.

    Args:
        graph_module: An ATen graph with ``meta["val"]`` and static sizes.
        roles: Name of a placeholder -> binding time. Placeholders that are left out are weights.
        n_steps: Rows of the table.
        byte_budget: Upper limit in bytes for all rows of all residuals. None allows 256 MiB, or one byte for every 16
            of weights that the body no longer reads.
        exchange: Prices of the cost model; None takes those of the device of the graph's tensors.

    Returns:
        The stages, the body and the report.

    Raises:
        ValueError: For a role that names no placeholder, or an early value of symbolic size.

    Example:
        >>> import torch
        >>> from torch.fx.experimental.proxy_tensor import make_fx
        >>> from fusion_compile.passes import BindingTime, hoist_time_conditioning
        >>> def model(x, t, w):
        ...     return x * (t.sin() @ w)
        >>> graph_module = make_fx(model, tracing_mode="fake")(torch.ones(2, 4), torch.ones(2, 8), torch.ones(8, 4))
        >>> roles = {"x_1": BindingTime.LIVE, "t_1": BindingTime.STEP}
        >>> split = hoist_time_conditioning(graph_module, roles, n_steps=4)
        >>> split.residuals, split.body.inputs
        ({'mm': <BindingTime.STEP: 1>}, ('x_1', 'mm'))
    """
    graph = graph_module.graph
    placeholders = {n.name: n for n in graph.find_nodes(op="placeholder")}
    if unknown := sorted(set(roles) - set(placeholders)):
        raise ValueError(
            f"roles name {unknown}, which are no inputs of the graph; its inputs are {sorted(placeholders)}."
        )
    times = binding_times(graph, roles)
    if exchange is None:
        exchange = exchange_rates(next(t.device for t in map(tensor_of, graph.nodes) if t is not None))
    choice = choose_residuals(graph, times, n_steps, byte_budget, exchange)
    for node in choice.residuals:
        value = tensor_of(node)
        if value is not None and not is_static(value):
            raise ValueError(f"{format_node(node)}: a table needs static sizes; export the graph for one shape.")

    stages: dict[BindingTime, Stage] = {}
    needed = _needed(graph, times, choice)
    of_weights = _views_of_weights(graph, needed, times)
    for time in EARLY:
        nodes = [n for n in needed if times[n] is time]
        asked = [n for n in choice.residuals if n.op == "placeholder" and times[n] is time]
        outputs = asked + [
            n
            for n in nodes
            if n in choice.residuals
            or (n not in of_weights and any(u in needed and times[u] is not time for u in n.users))
        ]
        if outputs:
            mine = _read_by(outputs, {*nodes, *of_weights})
            stages[time] = _extract(graph_module, [n for n in needed if n in mine], outputs)
    body_nodes = [n for n in graph.nodes if n in choice.body]
    body = _extract(graph_module, body_nodes, None)
    body_calls = len(calls(body.graph_module.graph))
    report = PassReport(
        name="hoist_time_conditioning",
        exact=True,
        changed=len(calls(graph)) - body_calls,
        nodes_before=len(calls(graph)),
        nodes_after=body_calls,
        bytes_added=choice.table_bytes,
        declined=_declined(graph, times, choice, n_steps),
    )
    counts = {time: sum(1 for n in calls(graph) if times[n] is time) for time in BindingTime}
    return Hoisted(stages, body, {r.name: times[r] for r in choice.residuals}, counts, report)


def _needed(graph: fx.Graph, times: dict[fx.Node, BindingTime], choice: Choice) -> dict[fx.Node, None]:
    """The early nodes from which the residuals are computed, in graph order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function" or times[node] is BindingTime.LIVE:
            continue
        if node in choice.residuals or any(u in needed for u in node.users):
            needed.add(node)
    return {n: None for n in graph.nodes if n in needed}


def _views_of_weights(
    graph: fx.Graph, needed: Mapping[fx.Node, None], times: dict[fx.Node, BindingTime]
) -> set[fx.Node]:
    """Nodes that share the memory of a weight.

    Each stage makes its own: kept from one stage to the next, a view would hold the weight's memory, which could then
    not be released.
    """
    found: set[fx.Node] = set()
    for node in needed:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and (is_weight(source, times) or source in found) and _may_share(node, source):
            found.add(node)
    return found


def _read_by(outputs: list[fx.Node], among: set[fx.Node]) -> set[fx.Node]:
    """The nodes in `among` from which `outputs` are computed."""
    found: set[fx.Node] = set()
    waiting = [n for n in outputs if n in among]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [s for s in node.all_input_nodes if s in among]
    return found


def _may_share(node: fx.Node, source: fx.Node) -> bool:
    value, before = tensor_of(node), tensor_of(source)
    if is_view(node):
        return True
    same = value is not None and before is not None and (value.dtype, value.device) == (before.dtype, before.device)
    return op_name(node.target) in MAY_COPY and same


def _extract(graph_module: fx.GraphModule, nodes: list[fx.Node], outputs: list[fx.Node] | None) -> Stage:
    """A graph of `nodes`, whose inputs are what they read from outside. None returns the outputs of the whole graph."""
    graph = fx.Graph()
    inside = set(nodes)
    output = next(iter(graph_module.graph.find_nodes(op="output")))
    roots = output.all_input_nodes if outputs is None else outputs
    read = {source for node in nodes for source in node.all_input_nodes} | set(roots)
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node not in read or node in inside:
            continue
        copies[node] = graph.get_attr(str(node.target)) if node.op == "get_attr" else graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    if outputs is None:
        graph.output(fx.node.map_arg(output.args[0], lambda n: copies[n]))
    else:
        graph.output(tuple(copies[n] for n in outputs))
    inputs = tuple(str(n.target) for n in graph.find_nodes(op="placeholder"))
    names = tuple(n.name for n in roots)
    return Stage(fx.GraphModule(graph_module, graph), inputs, names)


def _declined(graph: fx.Graph, times: dict[fx.Node, BindingTime], choice: Choice, n_steps: int) -> tuple[Declined, ...]:
    """Nodes that run at every step though only early values reach them, and early values that the body computes."""
    declined = []
    for node in calls(graph):
        why = why_at_every_call(node)
        if why and all(times[s] is not BindingTime.LIVE for s in node.all_input_nodes):
            declined.append(Declined(node.name, f"{why}, so it runs at every step."))
    kept = set(choice.residuals)
    for node in everything_early(graph, times, n_steps).residuals:
        if node in kept or is_view(node):  # a view in the body is sunk there, not declined: it costs nothing
            continue
        row, n_rows = bytes_of(node), rows(times[node], n_steps)
        if node in choice.body_if_memory_is_free:
            reason = f"reading its {_mebibytes(row)} at every step costs more than computing it again."
        elif choice.memory_price == LEAST_SAVING:
            reason = f"{_rows_take(n_rows, row)} and computing it costs little. Give a byte_budget to keep it."
        else:
            reason = (
                f"{_rows_take(n_rows, row)}; the table's budget is "
                f"{_mebibytes(choice.budget)} and this is among what saves least for its "
                f"size. Raise byte_budget to keep it."
            )
        declined.append(Declined(node.name, f"{op_name(node.target)}: {reason}"))
    return tuple(declined)


def _rows_take(n_rows: int, row: int) -> str:
    many = "one row of it takes" if n_rows == 1 else f"{n_rows} rows of it take"
    return f"{many} {_mebibytes(row * n_rows)}"


def _mebibytes(n: int) -> str:
    return f"{n / 2**20:.1f} MiB" if n >= 2**20 else f"{n / 2**10:.1f} KiB"
