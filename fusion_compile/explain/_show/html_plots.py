"""The report's plots. matplotlib draws them and the page's style sheet colours them, so they follow light and dark.

Each plot is drawn wide and narrow, and the style sheet shows the one that fits. matplotlib is optional: without it the
report shows `MISSING` in place of each plot.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fusion_compile.explain._show import html_numbers as numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "This plot needs matplotlib, which is not installed: pip install matplotlib, and write the report again."
CHEAPEST_DRAWN = 10_000  # an operator below 1 / this of the most expensive one is not drawn
_POINTS = 600  # buckets of a curve: more than a reader can tell apart in its pixels
_REGION_COLOURS = {"forward": 1, "backward": 2, "optimizer": 3, "state": 4, "table": 4, "prologue": 5, "body": 1}
_COLOURS = 6
# matplotlib needs colours and the page needs names, so each name is drawn in a colour of its own and then replaced.
_NAMED = {
    "ink": "#010101", "muted": "#020202", "rule": "#030303", "accent": "#040404", "bad": "#050505", "paper": "#060606",
} | {f"region-{i}": f"#1000{i:02x}" for i in range(_COLOURS + 1)}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A drawing. `left`, `right`: ends of the horizontal axis, as fractions of the drawing's width."""

    svg: str
    width: int
    height: int
    left: float
    right: float


def region_colour(name: str, names: Sequence[str]) -> int:
    """Return the number of a region's colour, 1..6, the same everywhere in the report; 0 for nodes in no region.

    `names`: all regions, in the report's order.
    """
    if name not in names:
        return 0
    if name in _REGION_COLOURS:
        return _REGION_COLOURS[name]
    taken = {_REGION_COLOURS.get(each) for each in names}
    free = [colour for colour in range(1, _COLOURS + 1) if colour not in taken] or [_COLOURS]
    others = [each for each in names if each not in _REGION_COLOURS]
    return free[others.index(name) % len(free)]


def memory_plots(graph: dict[str, Any], names: Sequence[str], salt: str) -> list[Plot]:
    """Draw the bytes alive at each node, with the peak marked and the regions below.

    `salt`: unique for each drawing of a page, because matplotlib names parts of the drawing after it. Return [wide,
    narrow], or [] without matplotlib.
    """

    def draw(axes: Axes, narrow: bool) -> None:
        memory = graph["memory"]
        curve, peak = memory["curve"], memory["peak_node"]
        _step(axes, curve, "accent", fill=True)
        axes.plot([peak], [memory["peak_bytes"]], "o", color=_NAMED["bad"], markersize=6, clip_on=False, zorder=5)
        right = peak > 0.6 * len(curve)
        axes.annotate(
            f"peak {numbers.size(memory['peak_bytes'])}",
            (peak, memory["peak_bytes"]),
            xytext=(-9 if right else 9, 4),
            textcoords="offset points",
            ha="right" if right else "left",
            color=_NAMED["ink"],
            fontweight="bold",
        )
        _region_bands(axes, graph["nodes"], names)
        axes.set_ylim(0, 1.16 * max(memory["peak_bytes"], *curve, 1))
        axes.set_xlim(0, max(len(curve) - 1, 1))
        _byte_ticks(axes)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")

    return _draw_twice(draw, salt, wide=(1000, 290), narrow=(440, 280)) if graph["memory"]["curve"] else []


def compared_memory_plots(before: dict[str, Any], after: dict[str, Any], salt: str) -> list[Plot]:
    """Draw both programs' bytes alive over one axis, from the first node (0 %) to the last (100 %)."""

    def draw(axes: Axes, narrow: bool) -> None:
        top = 1
        for memory, colour, label in ((before, "muted", "before"), (after, "accent", "after")):
            curve = memory["curve"]
            if curve:
                scale = 100 / max(len(curve) - 1, 1)
                _step(
                    axes, curve, colour, fill=False, scale=scale, label=f"{label}: {numbers.size(memory['peak_bytes'])}"
                )
                top = max(top, memory["peak_bytes"], *curve)
        axes.set_ylim(0, 1.3 * top)
        axes.set_xlim(0, 100)
        _byte_ticks(axes)
        axes.set_xlabel("part of the program")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0f} %")
        axes.legend(loc="upper left", frameon=False, ncols=2, labelcolor=_NAMED["ink"])

    some = before["curve"] or after["curve"]
    return _draw_twice(draw, salt, wide=(1000, 250), narrow=(440, 250)) if some else []


def cost_plots(graph: dict[str, Any], names: Sequence[str], salt: str) -> list[Plot]:
    """Draw roofline time against arithmetic intensity, one point for each operator of each region."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for node in graph["nodes"]:
        if node["microseconds"]:
            group = groups[node["op"], node["region"]]
            group[0] += node["flops"]
            group[1] += node["bytes_read"] + node["bytes_written"]
            group[2] += node["microseconds"]
    points = [
        (op, region, flops / moved if moved else 0.0, time)
        for (op, region), (flops, moved, time) in groups.items()
        if time
    ]
    points.sort(key=lambda point: (-point[3], point[0], point[1]))
    points = [point for point in points if point[3] >= points[0][3] / CHEAPEST_DRAWN]
    with_flops = [point for point in points if point[2] > 0]
    without = [point for point in points if point[2] <= 0]

    ridge = _ridge(graph["nodes"])

    def draw(axes: Axes, narrow: bool) -> None:
        axes.set_xscale("log")
        axes.set_yscale("log")
        # An operator without FLOP has no place on a logarithmic axis, so it is drawn apart at the left end.
        lowest = min((point[2] for point in with_flops), default=1.0)
        highest = max((point[2] for point in with_flops), default=1.0)
        zero = lowest / 8
        axes.set_xlim((zero if without else lowest) / 2.4, highest * (40 if narrow else 4))
        axes.set_ylim(points[-1][3] / 2, points[0][3] * 2)
        for region in sorted({point[1] for point in points}, key=_order_of(names)):
            mine = [point for point in points if point[1] == region]
            axes.scatter(
                [point[2] if point[2] > 0 else zero for point in mine],
                [point[3] for point in mine],
                s=64,
                color=_NAMED[f"region-{region_colour(region, names)}"],
                edgecolors=_NAMED["paper"],
                linewidths=1.2,
                zorder=3,
            )
        if ridge is not None and lowest < ridge < highest:
            axes.axvline(ridge, color=_NAMED["muted"], linewidth=1, linestyle=(0, (4, 4)))
        _name_points(axes, [(op, x if x > 0 else zero, y) for op, _, x, y in points], most=6 if narrow else 14)
        decades = [10.0**power for power in range(math.floor(math.log10(lowest)), math.ceil(math.log10(highest)) + 1)]
        ticks = [decade for decade in decades if lowest / 3 <= decade] if with_flops else []
        labels = [numbers.plain(decade) for decade in ticks]
        if without:
            ticks, labels = [zero, *ticks], ["none", *labels]
        axes.set_xticks(ticks, labels)
        axes.yaxis.set_major_formatter(lambda y, _: numbers.round_time(y))
        axes.minorticks_off()
        axes.set_xlabel("arithmetic intensity, FLOP per byte")
        _legend_of_regions(axes, sorted({point[1] for point in points}, key=_order_of(names)), names)

    return _draw_twice(draw, salt, wide=(1000, 340), narrow=(440, 320)) if points else []


def _legend_of_regions(axes: Axes, regions: Sequence[str], names: Sequence[str]) -> None:
    """Say in a frame above the axes which colour is which region, with squares: a dot would look like a point."""
    from matplotlib.patches import Patch

    colours = [_NAMED[f"region-{region_colour(region, names)}"] for region in regions]
    # The first entry is the title. matplotlib leaves out a label that begins with "_".
    handles = [Patch(alpha=0, label="Legend:")]
    handles += [
        Patch(color=colour, label=f"\u200b{region or 'no region'}")
        for region, colour in zip(regions, colours, strict=True)
    ]
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.01, 1.01), labelcolor=_NAMED["ink"], ncols=7,
        facecolor=_NAMED["paper"], edgecolor=_NAMED["rule"], framealpha=1, fancybox=False,
        handlelength=0.9, handletextpad=0.4, columnspacing=1.2, borderpad=0.35,
    )  # fmt: skip


def _order_of(names: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    places = {name: at for at, name in enumerate(names)}
    return lambda name: (places.get(name, len(places)), name)


def _ridge(nodes: Sequence[dict[str, Any]]) -> float | None:
    """Return the intensity in FLOP per byte above which the fastest dtype is bound by compute; None if unknown.

    A roofline time is the larger of the bytes' time and the FLOPs' time. So the highest bytes and FLOPs per microsecond
    among the nodes are the device's peaks, if some node only moves bytes and some node is bound by compute.
    """
    timed = [node for node in nodes if node["microseconds"]]
    moved = [(node["bytes_read"] + node["bytes_written"]) / node["microseconds"] for node in timed]
    if not any(rate and not node["flops"] for node, rate in zip(timed, moved, strict=True)):
        return None
    bandwidth = max(moved)
    bound = [node for node, rate in zip(timed, moved, strict=True) if node["flops"] and rate < 0.9 * bandwidth]
    return max(node["flops"] / node["microseconds"] for node in bound) / bandwidth if bound else None


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]], most: int) -> None:
    """Name the points, the most expensive first. Skip a name that would overlap; the table has it."""
    right_end = axes.transAxes.transform((1, 1))[0]
    pixels = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels]
    for op, x, y in points[:most]:
        text = op.removeprefix("aten.").removesuffix(".default")
        width, (left, middle) = 6.8 * len(text), axes.transData.transform((x, y))
        on_left = left + 9 + width > right_end
        start = left - 9 - width if on_left else left + 9
        box = (start, middle - 8, start + width, middle + 8)
        if any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            continue
        taken.append(box)
        axes.annotate(
            text, (x, y), xytext=(-8 if on_left else 8, -4), textcoords="offset points",
            ha="right" if on_left else "left", color=_NAMED["ink"], fontsize=11,
        )  # fmt: skip


def _step(
    axes: Axes, curve: Sequence[int], colour: str, *, fill: bool, scale: float = 1.0, label: str | None = None
) -> None:
    """Draw a curve; of each bucket of a long one the lowest and the highest value, so that no peak is lost."""
    xs: list[float] = []
    ys: list[int] = []
    width = max(1, -(-len(curve) // _POINTS))
    for start in range(0, len(curve), width):
        bucket = curve[start : start + width]
        low, high = bucket.index(min(bucket)), bucket.index(max(bucket))
        for at in sorted({low, high}):
            xs.append((start + at) * scale)
            ys.append(bucket[at])
    axes.plot(xs, ys, drawstyle="steps-post", color=_NAMED[colour], linewidth=1.6, label=label)
    if fill:
        axes.fill_between(xs, ys, step="post", color=_NAMED[colour], alpha=0.14, linewidth=0)


def _region_bands(axes: Axes, nodes: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Draw a strip below the axis, coloured by region. A region that is wide enough also carries its name."""
    start = 0
    for at in range(1, len(nodes) + 1):
        region = nodes[start]["region"]
        if at < len(nodes) and nodes[at]["region"] == region:
            continue
        if region:
            colour = _NAMED[f"region-{region_colour(region, names)}"]
            axes.axvspan(
                start, min(at, len(nodes) - 1), ymin=-0.135, ymax=-0.105, clip_on=False, color=colour, linewidth=0
            )
            if at - start > 0.12 * len(nodes):
                middle = (start + at) / 2
                axes.text(
                    middle, -0.145, region, transform=axes.get_xaxis_transform(), ha="center", va="top",
                    color=_NAMED["ink"], fontsize=11,
                )  # fmt: skip
        start = at


def _byte_ticks(axes: Axes) -> None:
    """Put ticks at round numbers of the unit that fits the axis."""
    top = axes.get_ylim()[1]
    unit = 1024.0 ** max(0, min(5, int(len(f"{int(top):b}") - 1) // 10))
    raw = top / unit / 4
    magnitude = 10 ** (len(str(int(raw))) - 1) if raw >= 1 else 0.1
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= raw)
    ticks = [i * step * unit for i in range(int(top / unit / step) + 1)]
    axes.set_yticks(ticks, [numbers.size(tick).replace(".00", "").replace(".0 ", " ") for tick in ticks])


def _draw_twice(
    draw: Callable[[Axes, bool], None], salt: str, *, wide: tuple[int, int], narrow: tuple[int, int]
) -> list[Plot]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return []
    plots = []
    for (width, height), is_narrow in ((wide, False), (narrow, True)):
        settings: Any = {
            "svg.fonttype": "none",
            "svg.hashsalt": f"{salt}-{'narrow' if is_narrow else 'wide'}",
            "font.family": "sans-serif",
            "font.size": 12,
            "axes.edgecolor": _NAMED["rule"],
            "axes.labelcolor": _NAMED["muted"],
            "axes.labelsize": 11,
            "xtick.color": _NAMED["rule"],
            "ytick.color": _NAMED["rule"],
            "xtick.labelcolor": _NAMED["muted"],
            "ytick.labelcolor": _NAMED["muted"],
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "legend.fontsize": 11,
            "text.parse_math": False,  # a "$" in an operator's name is a plain character
        }
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(settings)
            figure = Figure(figsize=(width / 72, height / 72))  # one unit of the drawing is one pixel of the page
            left, right = 76 / width, 1 - 14 / width
            axes = figure.add_axes((left, 62 / height, right - left, 1 - 88 / height))
            axes.patch.set_alpha(0)
            figure.patch.set_alpha(0)
            for side in ("top", "right", "left"):
                axes.spines[side].set_visible(False)
            axes.grid(True, axis="y", color=_NAMED["rule"], linewidth=0.6)
            axes.set_axisbelow(True)
            axes.tick_params(length=0, pad=6)
            with warnings.catch_warnings():
                # The page's fonts draw the text, so a character that matplotlib's own font lacks does not matter.
                warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
                draw(axes, is_narrow)
                plots.append(Plot(_svg(figure), width, height, left, right))
    return plots


def _svg(figure: Figure) -> str:
    """Return the drawing as an HTML element, without prologue, fonts and fixed colours."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', svg)
    svg = re.sub(r"font: ((?:\w+ )*[\d.]+px) [^;\"]*", r"font: \1 var(--sans)", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # these ids repeat in each drawing; ids that are referred to are unique
    for name, colour in _NAMED.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg.strip()
