"""Links that leave docs/ lead into the repository, of which the site has no address: it names the file instead.

``[the slow step](../examples/slow.py)`` becomes ``the slow step (examples/slow.py)``. In a checkout, and where the
repository is shown, the link works as it is written.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

LINK = re.compile(r"\[([^\]\n]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)\s]*)?\)")


def in_the_repository(page: str, target: str) -> str | None:
    """The repository path that `target` on `page` (a path below docs/) leads to; None if it stays in docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    return None if path.startswith("docs/") or path == "docs" else path


def without_repository_links(markdown: str, page: str) -> str:
    """`markdown` of `page` with each link that leaves docs/ replaced by its text and the file's path."""

    def replaced(match: re.Match[str]) -> str:
        path = in_the_repository(page, match[2])
        if path is None:
            return match[0]
        return f"`{path}`" if match[1].strip("`") == path else f"{match[1]} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """MkDocs calls this with each page's text before it is rendered."""
    return without_repository_links(markdown, page.file.src_uri)
