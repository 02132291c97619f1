"""What a notebook shows of an object as the last expression of a cell."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def preformatted(text: str) -> str:
    """`text` as HTML that keeps its lines and columns."""
    return f'<pre style="line-height: 1.25; white-space: pre">{html.escape(text)}</pre>'


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """An HTML table with `caption` above it."""

    def line(cells: Iterable[object], tag: str) -> str:
        inside = "".join(f'<{tag} style="text-align: left">{html.escape(str(cell))}</{tag}>' for cell in cells)
        return f"<tr>{inside}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<p>{html.escape(caption)}</p><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table>"
