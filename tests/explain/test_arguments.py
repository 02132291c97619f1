"""The inputs of `explain` in the form of torch.export: accepted, or refused with the right form."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fusion_compile.explain._arguments import Invocation, first_invocation, further_calls

FORM = "explain(model, (x, y), {'mask': mask})."


def test_a_tuple_and_a_dictionary_are_one_call() -> None:
    assert first_invocation((1, 2), None) == Invocation((1, 2), {})
    given = {"device": "cpu", "run": 3}
    invocation = first_invocation((), given)
    assert invocation == Invocation((), given) and invocation.kwargs is not given


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (torch.ones(2), None, f"explain() got a Tensor as args; give the inputs of one call as a tuple: {FORM}"),
        ([1, 2], None, f"explain() got a list as args; give the inputs of one call as a tuple: {FORM}"),
        (
            (1,),
            torch.ones(2),
            "explain() got a Tensor as kwargs; give all positional inputs in one tuple and keyword inputs in a "
            f"dictionary: {FORM}",
        ),
        (
            (1,),
            {1: 2},
            "explain() got a dict as kwargs; give all positional inputs in one tuple and keyword inputs in a "
            f"dictionary: {FORM}",
        ),
    ],
)
def test_the_old_form_is_refused_with_the_new_one(args: Any, kwargs: Any, said: str) -> None:
    with pytest.raises(TypeError) as refused:
        first_invocation(args, kwargs)
    assert str(refused.value) == said


def test_further_calls_are_tuples_or_pairs() -> None:
    calls = [(1, 2), ((1,), {"b": 2}), ((1,), {}), ((1,), 2), (1, {"b": 2}), ()]
    assert further_calls(calls) == (
        Invocation((1, 2), {}),
        Invocation((1,), {"b": 2}),
        Invocation((1,), {}),
        Invocation(((1,), 2), {}),
        Invocation((1, {"b": 2}), {}),
        Invocation((), {}),
    )
    # Two positional inputs, a tuple and a dictionary, need the explicit form.
    assert further_calls([(((1,), {"b": 2}), {})]) == (Invocation(((1,), {"b": 2}), {}),)


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (torch.ones(2, 2), "explain() got a Tensor as calls; give a sequence of calls: calls=[(x, y)]."),
        (3, "explain() got a int as calls; give a sequence of calls: calls=[(x, y)]."),
        (
            [(1,), torch.ones(2)],
            "explain() got a Tensor as calls[1]; each call is a tuple of arguments, (x, y), a pair of them with "
            "keywords, ((x, y), {'mask': mask}), or a function to call in between, model.eval.",
        ),
    ],
)
def test_other_calls_are_refused(calls: Any, said: str) -> None:
    with pytest.raises(TypeError) as refused:
        further_calls(calls)
    assert str(refused.value) == said


def test_functions_between_calls_are_kept_in_their_places_and_one_at_the_end_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    assert further_calls([model.eval, (1,), model.train, (2,)]) == (
        model.eval,
        Invocation((1,), {}),
        model.train,
        Invocation((2,), {}),
    )
    with pytest.raises(ValueError, match=r"got Module\.eval as the last of calls, so no call shows what it changes"):
        further_calls([(1,), model.eval])
