"""Docstrings of this package head their example with ``Example:``; Griffe knows the section as ``Examples:``.

Without this, the lines that begin with ``>>>`` would be rendered as quotations.
"""

from __future__ import annotations

import re
from typing import Any

import griffe


def with_examples_section(docstring: str) -> str:
    """`docstring` with a heading ``Example:`` on a line of its own in the plural."""
    return re.sub(r"^( *)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)


class ExampleSections(griffe.Extension):
    """Griffe calls this with each object that it has read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_examples_section(obj.docstring.value)
