"""What a slot of carried state may hold, taken apart and put together again."""

from __future__ import annotations

import collections
import dataclasses
import functools
import types
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._capture.python_state.slots import MISSING, Slot, read, write
from fusion_compile._step.carried_values import (
    PartOf,
    changing_numbers,
    filled,
    form_of,
    numbers_in,
    part,
    shape_of,
    tensors_in,
    with_part,
)


class Holder:
    pass


class Moments(NamedTuple):
    mean: Tensor
    steps: int


@dataclasses.dataclass(frozen=True)
class Kept:
    mean: Tensor
    rate: float = 0.5


def test_a_shape_tells_structures_apart() -> None:
    one, other = torch.zeros(2), torch.ones(2)
    assert shape_of([one, {"a": 1}]) == shape_of([other, {"a": 1}])
    assert len({shape_of(v) for v in (None, one, [one], (one,), {"a": one}, one.double(), one[:1], 1, 1.0, True)}) == 10
    with pytest.raises(TypeError, match=r"Holder"):
        shape_of([Holder()])


def test_a_form_holds_no_tensor_and_is_filled_again() -> None:
    value = {"a": [torch.zeros(1), (3, torch.ones(2))]}
    form = form_of(value, "m")
    assert [path for path, _ in tensors_in(value, "m")] == ["m['a'][0]", "m['a'][1][1]"]
    assert list(tensors_in(form, "m")) == []
    again = filled(form, dict(tensors_in(value, "m")))
    assert again["a"][0] is value["a"][0] and again["a"][1][0] == 3


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Moments(t, 3),
        lambda t: Kept(t),
        lambda t: collections.deque([t, 1], maxlen=4),
        lambda t: collections.defaultdict(list, a=[t]),
        lambda t: collections.OrderedDict(a=t),
        lambda t: types.SimpleNamespace(mean=t, rate=2),
        lambda t: functools.partial(torch.add, t, alpha=2),
        lambda t: functools.partial(torch.add, other=(t,)),
    ],
)
def test_containers_of_many_kinds_are_built_anew(make: Any) -> None:
    one, other = torch.zeros(2), torch.ones(2)
    value = make(one)
    [(path, found)] = tensors_in(value, "m")
    assert found is one and path.startswith("m[") and list(tensors_in(form_of(value, "m"), "m")) == []
    again = filled(form_of(value, "m"), {path: other})
    assert type(again) is type(value) and again is not value
    assert [tensor for _, tensor in tensors_in(again, "m")] == [other] and shape_of(again) == shape_of(value)
    assert shape_of(make(torch.zeros(3))) != shape_of(value)


def test_a_partial_of_another_function_has_another_shape() -> None:
    assert shape_of(functools.partial(torch.add)) != shape_of(functools.partial(torch.mul))


def test_the_models_own_tensors_are_no_state() -> None:
    parameter, leaf = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    own = {id(parameter): parameter, id(leaf): parameter}
    value = {"w": leaf, "mean": torch.zeros(1)}
    assert [path for path, _ in tensors_in(value, "m", own)] == ["m['mean']"]
    assert filled(form_of(value, "m", own), {"m['mean']": torch.ones(1)})["w"] is parameter
    assert shape_of(value, own) == shape_of({"w": parameter, "mean": torch.ones(1)}, own)


def test_a_part_is_read_and_the_whole_is_copied_around_another_one() -> None:
    value: dict[str, Any] = {"a": Kept(torch.zeros(1), 0.5), "b": [(1, True)]}
    assert part(value, ("['a']", "['rate']")) == 0.5 and part(value, ("['c']", "[0]")) is MISSING
    other = with_part(value, ("['b']", "[0]", "[0]"), 7)
    assert other["b"] == [(7, True)] and value["b"] == [(1, True)] and other["a"].mean is value["a"].mean
    assert with_part(value, ("['c']",), 7) is value
    assert numbers_in(value) == {("['a']", "['rate']"): 0.5, ("['b']", "[0]", "[0]"): 1}


def test_a_slot_inside_of_a_tuple_replaces_the_tuple() -> None:
    owner = {"state": Moments(torch.zeros(1), 3)}
    outer = Slot(owner, "state", "m.state")
    slot = Slot(PartOf(outer), ("[1]",), "m.state[1]")
    before = owner["state"]
    write(slot, 4)
    assert read(slot) == 4 and owner["state"] == (before.mean, 4) and before.steps == 3


def test_numbers_that_change_are_found_where_nothing_else_does() -> None:
    outer = Slot({}, "s", "m.s")
    values = [(torch.zeros(1), n, 5) for n in range(3)]
    assert [slot.label for slot in changing_numbers(outer, values)] == ["m.s[1]"]
    assert changing_numbers(outer, [(1,), (1, 2), (1, 2, 3)]) == changing_numbers(outer, [1, 2, 3]) == []
