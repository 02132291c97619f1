"""What the site changes in pages and docstrings before it renders them."""

from __future__ import annotations

from docs.hooks.docstring_examples import with_examples_section
from docs.hooks.repository_links import without_repository_links


def test_a_link_that_leaves_docs_becomes_text_and_the_files_path() -> None:
    page = "See [the slow step](../../examples/slow.py) and [README.md](../../README.md#layout)."
    shown = "See the slow step (`examples/slow.py`) and `README.md`."
    assert without_repository_links(page, "tutorials/slow.md") == shown


def test_a_link_that_stays_in_docs_is_left_alone() -> None:
    page = "See [the design](../design.md#rooms), [here](#rooms) and [there](https://arxiv.org/abs/2302.06675)."
    assert without_repository_links(page, "tutorials/slow.md") == page


def test_the_example_of_a_docstring_becomes_a_section() -> None:
    docstring = "One line.\n\nExample:\n    >>> 1 + 1\n    2\n\nFor Example: nothing."
    assert with_examples_section(docstring) == docstring.replace("\nExample:", "\nExamples:")
