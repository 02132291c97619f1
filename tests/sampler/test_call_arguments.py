"""The arguments of a call: a tuple, keywords, or a pair."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fusion_compile._sampler.call_arguments import as_args_and_kwargs, refuse_other_forms


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 2), ((1, 2), {})),
        ({"x": 1}, ((), {"x": 1})),
        (((1,), {"t": 2}), ((1,), {"t": 2})),
        ((), ((), {})),
        (([1], {"t": 2}), (([1], {"t": 2}), {})),  # a list is a value, not arguments
    ],
    ids=["tuple", "keywords", "pair", "nothing", "two values"],
)
def test_three_forms_are_taken(given: Any, expected: Any) -> None:
    assert as_args_and_kwargs(given) == expected


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            [1, 2],
            "example_inputs is a list; pass a tuple (x, t, y), a dictionary of keywords, or a pair",
        ),
        ({1: 2}, "example_inputs: kwargs is a dictionary with the key 1"),
        (((1,), {2: 3}), "example_inputs: kwargs is a dictionary with the key 2"),
    ],
    ids=["a list", "a number as a name", "a number in a pair"],
)
def test_other_forms_are_refused_with_what_to_pass(given: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=re.escape(sentence)):
        as_args_and_kwargs(given)


def test_a_refusal_names_who_was_called() -> None:
    with pytest.raises(TypeError, match=r"^prepare: args is a int; pass a tuple"):
        refuse_other_forms(3, {}, "prepare")
    with pytest.raises(TypeError, match=r"^prepare: kwargs is a tuple; pass a dictionary"):
        refuse_other_forms((), (), "prepare")
