"""What `explain` answers with: titled tables of text, and findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusion_compile.passes import Finding


@dataclass(frozen=True)
class Section:
    """A heading, column names and rows of text; numbers are aligned right."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Explanation:
    """Facts about a compiled object. ``print(explanation)`` gives plain text; `show` draws tables on the terminal.

    `findings`: host syncs and operators that a CUDA graph cannot hold, each with the user's line, the reason, the
    remedy.
    """

    title: str
    sections: tuple[Section, ...]
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        out = StringIO()
        self._write(Console(file=out, width=140, no_color=True, force_terminal=False, highlight=False))
        return out.getvalue().rstrip()

    def show(self) -> None:
        """Print to standard output, with colours when it is a terminal."""
        self._write(Console(highlight=False))

    def _write(self, console: Console) -> None:
        console.print(Text(self.title, style="bold"))
        for section in self.sections:
            console.print()
            console.print(_table(section))
        console.print()
        if self.findings:
            console.print(f"{len(self.findings)} findings:")
            for finding in self.findings:
                console.print(Text(f"  {finding}"))
        else:
            console.print("No host sync, nothing that a CUDA graph cannot hold.")
        for note in self.notes:
            console.print(Text(f"Note: {note}"))


def _table(section: Section) -> Table:
    table = Table(title=section.heading, title_justify="left", box=None, pad_edge=False, header_style="dim")
    for i, column in enumerate(section.columns):
        numeric = bool(section.rows) and all(_is_number(row[i]) for row in section.rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=i == 0)
    for row in section.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").replace("%", "").strip().isdigit() or not cell


def section(heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Section:
    """A `Section` from rows of anything; integers get thousands separators."""

    def text(cell: Any) -> str:
        return f"{cell:,}" if isinstance(cell, int) else str(cell)

    return Section(heading, tuple(columns), tuple(tuple(text(c) for c in row) for row in rows))
