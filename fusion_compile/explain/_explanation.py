"""What `explain` answers with: findings, tables, graphs with their costs, and what was seen when it ran."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import StringIO
from typing import Any, Literal

from rich.console import Console

from fusion_compile.explain._facts import (
    Environment,
    GraphFacts,
    Hoisting,
    PassFacts,
    RuntimeFacts,
    Section,
    SummaryLine,
)
from fusion_compile.explain._show.diff import Difference, compare
from fusion_compile.explain._show.json_form import plain, read_json, rebuild, write_json
from fusion_compile.explain._show.text import WIDTH, write_text
from fusion_compile.explain._show.why import tell
from fusion_compile.passes import Finding

SCHEMA = "fusion_compile.explanation"
VERSION = 1
"""Of the JSON. It grows when a field changes its meaning or goes; a field that is new leaves it as it is."""

Kind = Literal["training_step", "sampler", "exported_program", "graph_module", "callable"]


@dataclass(frozen=True)
class Explanation:
    """Facts about a program, as plain data. ``print(explanation)`` gives plain text; `print` draws it on the terminal.

    `findings`: what breaks a promise or costs, each with the user's line, the reason, the remedy. `sections`: tables of
    text. `graphs`: every node with its costs, and the memory over the program. `runtime`: None when nothing was run.
    `hoisting`: of a sampler.
    """

    title: str
    kind: Kind
    environment: Environment
    summary: tuple[SummaryLine, ...] = ()
    findings: tuple[Finding, ...] = ()
    sections: tuple[Section, ...] = ()
    graphs: tuple[GraphFacts, ...] = ()
    passes: tuple[PassFacts, ...] = ()
    runtime: RuntimeFacts | None = None
    hoisting: Hoisting | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        out = StringIO()
        write_text(self, Console(file=out, width=WIDTH, no_color=True, force_terminal=False, highlight=False))
        return out.getvalue().rstrip()

    def print(self) -> None:
        """Print to standard output, with colours when it is a terminal."""
        write_text(self, Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH))

    def to_json(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """What `json.dumps` takes, of a versioned form that `from_json` reads; with `path` it is also written there."""
        data = {"schema": SCHEMA, "version": VERSION, **plain(self)}
        if path is not None:
            write_json(data, path)
        return data

    @staticmethod
    def from_json(source: Mapping[str, Any] | str | os.PathLike[str]) -> Explanation:
        """The explanation that `to_json` gave or wrote. Raises ValueError for anything else, or another version."""
        data = source if isinstance(source, Mapping) else read_json(source)
        name = "what was given" if isinstance(source, Mapping) else str(source)
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ValueError(f"{name} is no explanation; give what Explanation.to_json() returned or wrote.")
        if data.get("version") != VERSION:
            raise ValueError(
                f"{name} is an explanation of version {data.get('version')!r} and this fusion_compile reads version "
                f"{VERSION}; write it again with the version that you have."
            )
        try:
            return rebuild(Explanation, data)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{name} is an explanation with parts missing ({error}); write it again.") from None

    def diff(self, other: Explanation) -> Difference:
        """What `other` has more, less and otherwise than this one."""
        return compare(self, other)

    def why(self, name: str) -> str:
        """The story of one value: of a node, a weight or an input, by its name here or its full name in the module.

        Where it is computed, from which inputs, what it costs; in a sampler also when it is known, through what, and
        why it was or was not hoisted. Raises KeyError naming the nearest names if there is none.
        """
        return tell(self, name)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report: one file that needs no network and no server."""
        from fusion_compile.explain._show.html import write_html  # a heavy room, of no use to who reads text

        write_html(self.to_json(), path)
