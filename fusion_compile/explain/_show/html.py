"""An explanation as one HTML file that opens from disk. It loads nothing, and equal data give equal bytes."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from fusion_compile.explain._comparison import compare
from fusion_compile.explain._facts import SCHEMA, VERSION, ExplanationFacts
from fusion_compile.explain._show import html_numbers, html_plots
from fusion_compile.explain._show.html_diff import diff_rows
from fusion_compile.explain._show.html_payload import Data, finding_places, payload, region_names
from fusion_compile.explain._show.json_form import rebuild
from fusion_compile.explain._show.region_diagram import BOX_HEIGHT, BOX_WIDTH, region_diagram

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("format.js", "virtual_table.js", "tables.js", "report.js")
_SEVERITIES = ("error", "warning", "note")
_NUMBER = re.compile(r"|[-−+]?([\d,]*\.?\d+(e[-+]?\d+)?|inf|nan)( ?(%|[A-Za-zµ]{1,5}(/s)?))?", re.ASCII | re.IGNORECASE)
_ALIVE_SHOWN = 25
_SHORT = 28  # characters of the longest fact that is shown beside others
# Kinds of errors by which a captured program is compiled or recorded again. All others keep it from capture.
_AGAIN = ("recompile", "python_scalar", "growing_state", "dynamic_shape", "rerecord")


def write_html(data: Data, path: str | os.PathLike[str]) -> None:
    """Write the report of one explanation. `data`: returned by ``Explanation.to_json()``.

    The memory and cost plots need matplotlib; without it the report says so. Raise ValueError for other data.
    """
    _check(data, "write_html() got")
    regions = region_names(data)
    graphs = [_graph_view(graph, at, regions) for at, graph in enumerate(data["graphs"])]
    places = finding_places(data)
    nodes: dict[int, tuple[int, int, str]] = {}  # finding -> graph, node and name of the first node that shows it
    for g, graph in enumerate(data["graphs"]):
        for i, node in enumerate(graph["nodes"]):
            if node["finding"] in places:
                nodes.setdefault(places[node["finding"]], (g, i, node["name"]))
    # The page has its own list of expensive lines, with links.
    facts = [fact for fact in data["summary"] if not fact["label"].startswith("most expensive")]
    against = [f for f in data["findings"] if f["severity"] == "error" or f["kind"] == "cudagraph_partition"]
    order = sorted(range(len(data["findings"])), key=lambda i: _SEVERITIES.index(data["findings"][i]["severity"]))
    _write(
        path,
        "report.html.j2",
        payload(data),
        data=data,
        graphs=graphs,
        findings=[{"index": i, "node": nodes.get(i), **data["findings"][i]} for i in order],
        severities=_counted((finding["severity"] for finding in data["findings"]), _SEVERITIES),
        kinds=_counted(finding["kind"] for finding in data["findings"]),
        not_captured=_counted(f["kind"] for f in against if f["kind"] not in _AGAIN),
        again=_counted(f["kind"] for f in against if f["kind"] in _AGAIN),
        expensive=_most_expensive(data["graphs"]),
        short_facts=[fact for fact in facts if len(fact["value"]) <= _SHORT],
        long_facts=[fact for fact in facts if len(fact["value"]) > _SHORT],
        total_time=sum(node["microseconds"] or 0 for graph in data["graphs"] for node in graph["nodes"]),
        nodes_count=sum(len(graph["nodes"]) for graph in data["graphs"]),
    )


def write_diff_html(before: Data, after: Data, path: str | os.PathLike[str]) -> None:
    """Write the comparison of two explanations: findings, regions, memory, operators, nodes, passes, runtime.

    `before`, `after`: returned by ``Explanation.to_json()``. Raise ValueError for other data.
    """
    _check(before, "write_diff_html() got, as the first,")
    _check(after, "write_diff_html() got, as the second,")
    difference = compare(rebuild(ExplanationFacts, before), rebuild(ExplanationFacts, after))
    view = diff_rows(difference, before, after)
    rows: Data = {"changed": view.pop("changed")}
    _write(path, "diff.html.j2", rows, before=before, after=after, **view)


def _check(data: Data, got: str) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        what = f"a {type(data).__name__}" if schema is None else f"data of the schema {schema!r}"
        raise ValueError(f"{got} {what}; it takes the data of an explanation: give it explanation.to_json().")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{got} an explanation of version {data.get('version')!r}; this fusion_compile reads version {VERSION}: "
            "write the explanation again with the installed version."
        )


def _write(path: str | os.PathLike[str], template: str, rows: Data, **view: Any) -> None:
    script = "\n".join(_read(name) for name in _SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = (
        _environment()
        .get_template(template)
        .render(
            rows=rows,
            style=Markup(_read("report.css")),
            script=Markup(script),
            script_hash=f"sha256-{digest}",
            matplotlib_missing=html_plots.MISSING,
            cheapest_drawn=html_plots.CHEAPEST_DRAWN,
            box=(BOX_WIDTH, BOX_HEIGHT),
            **view,
        )
    )
    # A name may hold half a surrogate pair, which no UTF-8 file can.
    Path(path).write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")


def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {
        "count": html_numbers.count,
        "flops": html_numbers.flops,
        "size": html_numbers.size,
        "time": html_numbers.time,
        "numeric_columns": _numeric_columns,
        "short": _short,
        "ticked": _ticked,
    }
    environment.globals |= {"share": html_numbers.share, "change": html_numbers.change}
    return environment


def _numeric_columns(rows: list[list[str]]) -> set[int]:
    """Return the columns of a text table that hold numbers, with or without a unit. They are aligned right."""
    columns = zip(*rows, strict=True)
    return {at for at, cells in enumerate(columns) if any(cells) and all(map(_NUMBER.fullmatch, cells))}


def _short(where: str) -> str:
    """``"/home/ada/dit/model.py:41"`` -> ``"dit/model.py:41"``."""
    return "/".join(where.replace("\\", "/").split("/")[-2:])


def _ticked(text: str) -> Markup:
    """Mark text between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # an unpaired backtick is only a backtick
        return escape(text)
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts))


def _counted(values: Any, order: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    counts = Counter(values)
    return sorted(counts.items(), key=lambda each: (order.index(each[0]) if order else -each[1], each[0]))


def _graph_view(graph: Data, at: int, regions: list[str]) -> Data:
    memory = graph["memory"]
    alive = sorted(memory["alive_at_peak"], key=lambda tensor: -tensor["bytes"])
    return {
        "at": at,
        "name": graph["name"],
        "regions": graph["regions"],
        "colours": {name: html_plots.region_colour(name, regions) for name in regions},
        "edges": graph["edges"],
        "diagrams": [region_diagram(graph, across=True), region_diagram(graph, across=False)],
        "memory": memory,
        "memory_plots": html_plots.memory_plots(graph, regions, f"memory-{at}"),
        "cost_plots": html_plots.cost_plots(graph, regions, f"cost-{at}"),
        "has_cost": any(node["microseconds"] for node in graph["nodes"]),
        "operators": _operators(graph)[:10],
        "alive": alive[:_ALIVE_SHOWN],
        "alive_rest": (len(alive[_ALIVE_SHOWN:]), sum(tensor["bytes"] for tensor in alive[_ALIVE_SHOWN:])),
        "peak_name": graph["nodes"][memory["peak_node"]]["name"] if graph["nodes"] and memory["curve"] else "",
        "total_time": sum(node["microseconds"] or 0 for node in graph["nodes"]),
    }


def _operators(graph: Data) -> list[Data]:
    """Sum up operators by roofline time, the most expensive first. Leave out those that take no time."""
    totals: dict[str, Data] = {}
    for node in graph["nodes"]:
        if node["microseconds"]:
            total = totals.setdefault(node["op"], {"op": node["op"], "nodes": 0, "flops": 0, "bytes": 0, "time": 0.0})
            total["nodes"] += 1
            total["flops"] += node["flops"]
            total["bytes"] += node["bytes_read"] + node["bytes_written"]
            total["time"] += node["microseconds"]
    return sorted(totals.values(), key=lambda total: (-total["time"], total["op"]))


def _most_expensive(graphs: list[Data]) -> list[Data]:
    """Return the three lines of the user's source with the longest roofline time.

    A node without a line counts for its operator instead.
    """
    lines: dict[str, Data] = {}
    for graph in graphs:
        for node in graph["nodes"]:
            if node["microseconds"]:
                key = node["where"] or node["op"]
                line = lines.setdefault(
                    key,
                    {
                        "where": node["where"],
                        "search": key,
                        "time": 0.0,
                        "nodes": 0,
                        "ops": Counter(),
                        "regions": Counter(),
                    },
                )
                line["time"] += node["microseconds"]
                line["nodes"] += 1
                line["ops"][node["op"]] += node["microseconds"]
                line["regions"][node["region"]] += node["microseconds"]
    longest = sorted(lines.values(), key=lambda line: (-line["time"], line["search"]))[:3]
    for line in longest:
        line["ops"] = [op for op, _ in sorted(line["ops"].items(), key=lambda each: (-each[1], each[0]))]
        line["regions"] = [name for name in line["regions"] if name]
    return longest
