"""The nouns of an explanation."""

from __future__ import annotations

from fusion_compile.explain._facts import PassFacts, Section, section
from fusion_compile.passes import Declined, PassReport


def test_a_table_of_anything_becomes_text_with_thousands_separators() -> None:
    made = section("Sizes", ["name", "entries"], [("w", 1234567), ("b", 1.5)])
    assert made == Section("Sizes", ("name", "entries"), (("w", "1,234,567"), ("b", "1.5")))


def test_the_facts_of_a_pass_are_its_report_and_both_graphs() -> None:
    report = PassReport("fold", False, 2, 7, 5, 16, (Declined("mul", "It is read twice."),))
    facts = PassFacts.of(report, ["a", "b"], ["a"])
    assert (facts.name, facts.exact, facts.changed, facts.nodes_before, facts.nodes_after) == ("fold", False, 2, 7, 5)
    assert (facts.bytes_added, facts.declined) == (16, report.declined)
    assert (facts.before, facts.after) == (("a", "b"), ("a",))
