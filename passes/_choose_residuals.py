"""Choose by a minimum cut which early values a split graph keeps for its body and which the body computes again.

Keeping a value costs the traffic of writing, copying and reading it at every step, plus a price for the memory that all
its rows occupy. Computing it in the body costs its kernel, its arithmetic and the weights it reads. The cheapest cut
separates the early inputs from the live nodes. The price of memory rises until the kept values fit the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ._cost import Exchange, flops, launches
from ._dependence import BindingTime
from ._graph import bytes_of, is_view, tensor_of
from ._min_cut import INFINITE, FlowNetwork

SMALL_BYTES = 32 << 20
"""A table up to this size is kept for any saving, if the caller sets no budget."""

LEAST_SAVING = 40
"""Bytes of traffic that each byte of a larger table must save over a schedule. The text projections of the first block
of Flux and SD3 save 10 to 25, so that 0.2 GB of table would spare a millisecond or two; modulation saves hundreds."""

FREE_BYTES = 256 << 20
"""A table up to this size fits, whatever weights it releases."""

RELEASED_FRACTION = 16
"""Beyond FREE_BYTES, a table may take one byte for this many bytes of weights that the body no longer reads."""

_MEMORY_PRICES = (0, 1, 4, 16, 64, 256, 1024, 4096, 16384)
"""Prices of one byte of table, in bytes of traffic summed over a schedule."""


@dataclass(frozen=True)
class Choice:
    """A body and its residuals.

    `body`: the nodes of the body, including views sunk into it. `residuals`: the early nodes it reads, in graph order.
    `table_bytes`: all rows of all residuals. `budget`: the bytes that were allowed. `memory_price`: see the module.
    `body_if_memory_is_free`: the nodes that the body computes because reading them would take longer.
    """

    body: frozenset[fx.Node]
    residuals: tuple[fx.Node, ...]
    table_bytes: int
    budget: int
    memory_price: int
    body_if_memory_is_free: frozenset[fx.Node] = frozenset()


def choose_residuals(
    graph: fx.Graph, times: dict[fx.Node, BindingTime], n_steps: int, byte_budget: int | None, exchange: Exchange
) -> Choice:
    """The cheapest choice whose table fits `byte_budget`.

    None allows SMALL_BYTES for any saving, and where each byte saves LEAST_SAVING, FREE_BYTES or a share of the
    released weights.
    """
    choice = everything_early(graph, times, n_steps)
    free: frozenset[fx.Node] = frozenset()
    prices = [(price, True) for price in _MEMORY_PRICES]
    if byte_budget is not None:  # a limit is a limit, also for a table smaller than the weights it releases
        prices += [(price, False) for price in (*_MEMORY_PRICES, _MEMORY_PRICES[-1] ** 2)]
    else:
        prices = [(0, True), (LEAST_SAVING, True), *(p for p in prices if p[0] > LEAST_SAVING)]
    for price, count_released in prices:
        body = _cut(graph, times, n_steps, price, exchange, count_released)
        body, residuals = _settle(graph, times, body)
        table_bytes = sum(rows(times[r], n_steps) * bytes_of(r) for r in residuals)
        budget = byte_budget
        if budget is None:
            budget = max(FREE_BYTES, released_bytes(graph, times, body) // RELEASED_FRACTION)
        free = body if price == 0 else free
        choice = Choice(body, residuals, table_bytes, budget, price, free)
        if table_bytes <= (SMALL_BYTES if byte_budget is None and price == 0 else budget):
            break
    return choice


def everything_early(graph: fx.Graph, times: dict[fx.Node, BindingTime], n_steps: int) -> Choice:
    """The choice in which the body computes nothing that could be known earlier."""
    live = frozenset(n for n, time in times.items() if n.op == "call_function" and time is BindingTime.LIVE)
    body, residuals = _settle(graph, times, live)
    table_bytes = sum(rows(times[r], n_steps) * bytes_of(r) for r in residuals)
    return Choice(body, residuals, table_bytes, table_bytes, 0)


def rows(time: BindingTime, n_steps: int) -> int:
    """How many rows a value of this binding time has in its table."""
    return n_steps if time.per_step else 1


def released_bytes(graph: fx.Graph, times: dict[fx.Node, BindingTime], body: frozenset[fx.Node]) -> int:
    """Bytes of the weights that some node reads and no node of `body` reads."""
    return sum(
        bytes_of(n)
        for n in graph.find_nodes(op="placeholder")
        if is_weight(n, times) and n.users and not any(u in body or u.op == "output" for u in n.users)
    )


def is_weight(node: fx.Node, times: dict[fx.Node, BindingTime]) -> bool:
    """Whether `node` is a constant from outside, which the body can read without a table."""
    return node.op == "get_attr" or (node.op == "placeholder" and times[node] is BindingTime.CONST)


def _cut(
    graph: fx.Graph,
    times: dict[fx.Node, BindingTime],
    n_steps: int,
    memory_price: int,
    exchange: Exchange,
    count_released: bool,
) -> frozenset[fx.Node]:
    """The nodes that the body computes: the sink's side of a minimum cut, whose costs are bytes over all steps.

    `count_released`: whether weights that the body would read cost memory, as rows do.
    """
    network = FlowNetwork()
    ends: dict[fx.Node, tuple[int, int]] = {}
    for node, time in times.items():
        if time is BindingTime.LIVE or is_weight(node, times):
            continue
        start, end = ends[node] = network.node(), network.node()
        network.edge(start, end, _keeping_costs(node, time, n_steps, memory_price))
        again = _computing_costs(node, times, n_steps, memory_price if count_released else 0, exchange)
        network.edge(0, start, INFINITE if node.op == "placeholder" else again)
        for user in node.users:
            late = user.op == "output" or times[user] is BindingTime.LIVE
            if late:
                network.edge(end, 1, INFINITE)
        for source in node.all_input_nodes:
            if source in ends:
                network.edge(ends[source][1], start, INFINITE)
    early = network.source_side()
    recomputed = {n for n, (start, _) in ends.items() if start not in early and n.op != "placeholder"}
    live = {n for n, time in times.items() if n.op == "call_function" and time is BindingTime.LIVE}
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):  # the cut may leave on the sink's side what no live node needs
        if node in live or (node in recomputed and any(u in needed or u.op == "output" for u in node.users)):
            needed.add(node)
    return frozenset(needed)


def _keeping_costs(node: fx.Node, time: BindingTime, n_steps: int, memory_price: int) -> int:
    if tensor_of(node) is None:
        return INFINITE  # a tuple: only its items can be kept
    moved = 3 * n_steps if time.per_step else n_steps  # a row is read and written when copied, and read by the body
    return bytes_of(node) * (moved + memory_price * rows(time, n_steps))


def _computing_costs(
    node: fx.Node, times: dict[fx.Node, BindingTime], n_steps: int, memory_price: int, exchange: Exchange
) -> int:
    if is_view(node):
        return 0
    of_weights = [source for source in node.all_input_nodes if is_weight(_root(source), times)]
    work = launches(node) * exchange.bytes_per_launch + flops(node) // exchange.flops_per_byte
    read, released = sum(map(bytes_of, of_weights)), sum(map(bytes_of, map(_root, of_weights)))
    return n_steps * (work + read) + memory_price * released


def _settle(
    graph: fx.Graph, times: dict[fx.Node, BindingTime], body: frozenset[fx.Node]
) -> tuple[frozenset[fx.Node], tuple[fx.Node, ...]]:
    """Sink views into the body where their root is no larger than what is read of it; return body and residuals."""
    inside = set(body)
    while True:
        frontier = _frontier(graph, times, inside)
        by_root: dict[fx.Node, set[fx.Node]] = {}
        for node in frontier:
            by_root.setdefault(_root(node), set()).add(node)
        sunk = [
            node
            for root, views in by_root.items()
            for node in views
            if node is not root and (is_weight(root, times) or bytes_of(root) <= sum(map(bytes_of, views)))
        ]
        tuples = [node for node in frontier if tensor_of(node) is None and node.op != "placeholder"]
        if not sunk and not tuples:
            return frozenset(inside), tuple(n for n in graph.nodes if n in frontier)
        inside.update(tuples)
        for node in sunk:
            while node is not _root(node):
                inside.add(node)
                node = node.all_input_nodes[0]


def _frontier(graph: fx.Graph, times: dict[fx.Node, BindingTime], inside: set[fx.Node]) -> set[fx.Node]:
    readers = [n for n in graph.nodes if n in inside or n.op == "output"]
    return {
        source
        for reader in readers
        for source in reader.all_input_nodes
        if source not in inside and not is_weight(source, times) and times[source] is not BindingTime.LIVE
    }


def _root(node: fx.Node) -> fx.Node:
    while is_view(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node
