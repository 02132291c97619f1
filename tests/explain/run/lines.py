"""Lines of test files that are found by the comment at their end."""

from __future__ import annotations

from pathlib import Path


def line_of(file: str, text: str) -> str:
    """``file:line`` of the first line of `file` that ends with the comment `text`."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return f"{file}:{next(i for i, line in enumerate(lines, 1) if line.endswith(f'# {text}'))}"
