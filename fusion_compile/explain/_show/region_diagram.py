"""The regions of a program as boxes and the bytes between them as arrows: coordinates for an SVG."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import networkx  # type: ignore[import-untyped]

from fusion_compile.explain._show import html_numbers as numbers

BOX_WIDTH, BOX_HEIGHT = 196, 132
_GAP_ACROSS, _GAP_DOWN, _GAP_STACKED = 84, 46, 28  # pixels between layers, between rows, between boxes of one layer
_LEVEL = 30  # pixels beside the boxes for each long arrow
_MARGIN, _HEAD, _BEND = 2, 8, 10  # around everything; an arrow's tip; the radius of its corners
_PORTS_ACROSS, _PORTS_DOWN, _PORTS_LONG = 24, 40, 11  # between two arrows that end at one side of a box


Flow = tuple[str, str, int]  # from a region, to a region, bytes


@dataclass(frozen=True)
class Box:
    """A region. `share`: of the program's roofline time, 0..1. `facts`: lines of (quantity, value) under the name."""

    name: str
    x: int
    y: int
    facts: tuple[tuple[str, str], ...]
    share: float


@dataclass(frozen=True)
class Arrow:
    """A flow of bytes between two regions.

    `path`, `head`: SVG paths of its line and its tip. `x`, `y`, `anchor`: position and text anchor of the label.
    `turned`: the label runs upwards. `width`: of the line, in pixels.
    """

    source: str
    target: str
    label: str
    path: str
    head: str
    x: float
    y: float
    anchor: str
    turned: bool
    width: float


@dataclass(frozen=True)
class Diagram:
    """Boxes and arrows. `width`, `height`: in pixels."""

    boxes: tuple[Box, ...]
    arrows: tuple[Arrow, ...]
    width: int
    height: int


def region_diagram(graph: dict[str, Any], *, across: bool) -> Diagram:
    """Lay out the regions of `graph`, an entry of an explanation's ``"graphs"``.

    `across`: in columns from left to right, with independent regions in one column. Otherwise one region below the
    other, for a narrow page.
    """
    regions = {region["name"]: region for region in graph["regions"]}
    flows: list[Flow] = [(a, b, size) for a, b, size in graph["edges"] if a in regions and b in regions and a != b]
    layers = _layers(list(regions), flows)
    if not across:
        layers = [[name] for layer in layers for name in layer]
    places = _across(layers) if across else _down(layers)
    total = sum(region["microseconds"] for region in regions.values())
    boxes = tuple(
        Box(name, *places[name], _facts(region, total), region["microseconds"] / total if total else 0.0)
        for name, region in regions.items()
    )
    depth = {name: at for at, layer in enumerate(layers) for name in layer}
    # The shortest long arrow runs nearest to the boxes.
    longer = sorted((flow for flow in flows if not _is_short(depth, flow)), key=lambda flow: _span(depth, flow))
    right = max((x for x, _ in places.values()), default=0) + BOX_WIDTH
    bottom = max((y for _, y in places.values()), default=0) + BOX_HEIGHT
    drawn = _short_arrows(depth, places, flows, across) | _long_arrows(depth, places, longer, across, right, bottom)
    beside = _LEVEL * len(longer)
    width = right + _MARGIN + (beside + _BEND if longer and not across else 0)
    height = bottom + _MARGIN + (beside + _BEND if longer and across else 0)
    return Diagram(boxes, tuple(drawn[flow] for flow in flows), width, height)


def _facts(region: dict[str, Any], total: float) -> tuple[tuple[str, str], ...]:
    launches = region["launches"]
    return (
        ("nodes", numbers.count(region["nodes"])),
        ("launches", numbers.count(launches) if launches is not None else "–"),
        ("compute", numbers.flops(region["flops"])),
        ("moved", numbers.size(region["bytes"])),
        ("time", f"{numbers.time(region['microseconds'])} · {numbers.share(region['microseconds'], total)}"),
    )


def _layers(names: list[str], flows: list[Flow]) -> list[list[str]]:
    """Put each region in the layer after all regions that it reads. A program with a cycle keeps its own order."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(names)
    graph.add_edges_from((a, b) for a, b, _ in flows)
    if not networkx.is_directed_acyclic_graph(graph):
        return [[name] for name in names]
    return [sorted(layer, key=names.index) for layer in networkx.topological_generations(graph)]


def _across(layers: list[list[str]]) -> dict[str, tuple[int, int]]:
    tallest = max((len(layer) for layer in layers), default=1)
    pitch = BOX_HEIGHT + _GAP_STACKED
    return {
        name: (
            _MARGIN + column * (BOX_WIDTH + _GAP_ACROSS),
            _MARGIN + (tallest - len(layer)) * pitch // 2 + row * pitch,
        )
        for column, layer in enumerate(layers)
        for row, name in enumerate(layer)
    }


def _down(layers: list[list[str]]) -> dict[str, tuple[int, int]]:
    return {layer[0]: (_MARGIN, _MARGIN + row * (BOX_HEIGHT + _GAP_DOWN)) for row, layer in enumerate(layers)}


def _span(depth: dict[str, int], flow: Flow) -> int:
    return abs(depth[flow[1]] - depth[flow[0]])


def _is_short(depth: dict[str, int], flow: Flow) -> bool:
    """Whether the arrow ends in a neighbouring layer. One that passes a layer must run around the boxes."""
    return _span(depth, flow) == 1


def _short_arrows(
    depth: dict[str, int], places: dict[str, tuple[int, int]], flows: list[Flow], across: bool
) -> dict[Flow, Arrow]:
    """Draw arrows between neighbouring layers. Arrows at one side of a box are spread by the places of their other
    ends."""
    short = [flow for flow in flows if _is_short(depth, flow)]
    spread = _PORTS_ACROSS if across else _PORTS_DOWN

    def port(flow: Flow, name: str, other: str) -> tuple[float, int, int]:
        """Return the distance from the middle of the side, the position among its arrows, and their number."""
        side = [
            (places[b if a == name else a], a != name, (a, b, size))
            for a, b, size in short
            if name in (a, b) and depth[b if a == name else a] == depth[other]
        ]
        # Of two arrows in opposite directions, the one to the later layer comes first at both ends.
        side.sort(key=lambda end: (end[0][1], depth[end[2][0]]))
        at = [end[2] for end in side].index(flow)
        return spread * (at - (len(side) - 1) / 2), at, len(side)

    drawn = {}
    for flow in short:
        source, target, size = flow
        first, last = sorted((source, target), key=lambda name: depth[name])
        start, at, several = port(flow, first, last)
        end = port(flow, last, first)[0]
        (fx, fy), (lx, ly) = places[first], places[last]
        onwards = source == first
        width = _width(size, flows)
        if across:
            x0, y0 = float(fx + BOX_WIDTH), fy + BOX_HEIGHT / 2 + start
            x1, y1 = lx, ly + BOX_HEIGHT / 2 + end
            a, b = (x0, x1 - _HEAD) if onwards else (x0 + _HEAD, x1)
            bend = (x0 + x1) / 2
            path = f"M{a} {y0}C{bend} {y0} {bend} {y1} {b} {y1}"
            tip = f"M{x1} {y1}l-9 -5v10z" if onwards else f"M{x0} {y0}l9 -5v10z"
            # Beside the flat start of the line, on the side away from its bend.
            above = at < several / 2 if several > 1 else y1 >= y0
            x, y, anchor = x0 + 12, y0 - 7 - width / 2 if above else y0 + 16 + width / 2, "start"
        else:
            x0 = fx + BOX_WIDTH / 2 + start
            y0, y1 = fy + BOX_HEIGHT, ly
            path = f"M{x0} {y0}L{x0} {y1 - _HEAD}" if onwards else f"M{x0} {y0 + _HEAD}L{x0} {y1}"
            tip = f"M{x0} {y1}l-5 -9h10z" if onwards else f"M{x0} {y0}l-5 9h10z"
            on_left = several > 1 and at < several / 2
            x, y, anchor = x0 - 10 if on_left else x0 + 10, (y0 + y1) / 2 + 4, "end" if on_left else "start"
        drawn[flow] = Arrow(source, target, numbers.size(size), path, tip, x, y, anchor, False, width)
    return drawn


def _long_arrows(
    depth: dict[str, int],
    places: dict[str, tuple[int, int]],
    longer: list[Flow],
    across: bool,
    right: int,
    bottom: int,
) -> dict[Flow, Arrow]:
    """Draw the other arrows around the boxes, below them or on their right.

    At each box arrows going back come first, the shortest first, then arrows going on, the longest first. So none cross
    at the box.
    """
    drawn = {}
    for level, flow in enumerate(longer, 1):
        ends = []
        for name in flow[:2]:
            side = sorted(
                (each for each in longer if name in each[:2]),
                key=lambda each, name=name: _port_order(depth, longer, each, name),  # type: ignore[misc]
            )
            middle = places[name][0 if across else 1] + (BOX_WIDTH if across else BOX_HEIGHT) / 2
            ends.append(middle + _PORTS_LONG * (side.index(flow) - (len(side) - 1) / 2))
        source, target, size = flow
        edge = [places[name][1] + BOX_HEIGHT if across else places[name][0] + BOX_WIDTH for name in (source, target)]
        deep = (bottom if across else right) + _LEVEL * level
        turn = _BEND if ends[1] > ends[0] else -_BEND
        points = [
            (ends[0], edge[0]), (ends[0], deep - _BEND), (ends[0], deep), (ends[0] + turn, deep),
            (ends[1] - turn, deep), (ends[1], deep), (ends[1], deep - _BEND), (ends[1], edge[1] + _HEAD),
        ]  # fmt: skip
        at = [f"{a} {b}" if across else f"{b} {a}" for a, b in points]
        path = f"M{at[0]}L{at[1]}Q{at[2]} {at[3]}L{at[4]}Q{at[5]} {at[6]}L{at[7]}"
        middle = (ends[0] + ends[1]) / 2
        if across:
            tip = f"M{ends[1]} {edge[1]}l-5 9h10z"
            x, y, anchor = middle, deep - 6.0, "middle"
        else:
            tip = f"M{edge[1]} {ends[1]}l9 -5v10z"
            x, y, anchor = deep - 6.0, middle, "middle"
        drawn[flow] = Arrow(
            source, target, numbers.size(size), path, tip, x, y, anchor, not across, _width(size, longer)
        )
    return drawn


def _port_order(depth: dict[str, int], longer: list[Flow], flow: Flow, name: str) -> tuple[bool, int]:
    other = flow[1] if flow[0] == name else flow[0]
    onwards = depth[other] > depth[name]
    return onwards, -longer.index(flow) if onwards else longer.index(flow)


def _width(size: int, flows: list[Flow]) -> float:
    widest = max(size for *_, size in flows)
    return round(1.25 + 2.75 * (size / widest if widest else 0), 2)
