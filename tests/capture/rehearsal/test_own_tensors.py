"""The model's own tensors in the place of clones that stood for them."""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile._capture.rehearsal.own_tensors import StandIns, with_own

WEIGHT, MEAN = nn.Parameter(torch.ones(2)), torch.zeros(3)
CLONE, BUFFER = WEIGHT.detach().clone().requires_grad_(), MEAN.clone()
STAND_INS = StandIns([(CLONE, WEIGHT), (BUFFER, MEAN)])
Pair = namedtuple("Pair", "a b")


def test_a_parameter_is_known_by_identity_and_a_buffer_by_its_memory() -> None:
    assert STAND_INS.own(CLONE) is WEIGHT and STAND_INS.own(CLONE.detach()).requires_grad is False
    assert STAND_INS.own(BUFFER.detach()) is MEAN
    other = torch.zeros(2)
    assert STAND_INS.own(other) is other and not StandIns([])


def test_a_part_of_a_clone_stands_for_the_part_of_the_models_own() -> None:
    for clone, own in ((CLONE, WEIGHT), (BUFFER, MEAN)):
        part = STAND_INS.own(clone.detach()[:1])
        assert part.data_ptr() == own.data_ptr() and part.shape == own[:1].shape and not part.requires_grad
    row = STAND_INS.own(CLONE[0])
    assert row.grad_fn is not None and torch.equal(row, WEIGHT[0])


def test_containers_are_written_in_place_and_tuples_are_new() -> None:
    left: dict[str, Any] = {"list": [CLONE, 1], "pair": Pair(CLONE, BUFFER), "object": types.SimpleNamespace(w=CLONE)}
    assert with_own(left, STAND_INS.own) is left
    assert left["list"][0] is WEIGHT and left["pair"].a is WEIGHT and left["pair"].b is MEAN
    assert type(left["pair"]) is Pair and left["object"].w is WEIGHT
    whole = (1, [CLONE])
    assert with_own(whole, STAND_INS.own) is whole  # the list in it is the same
    assert whole[1][0] is WEIGHT


def test_keys_and_elements_are_exchanged_in_order() -> None:
    by_tensor: OrderedDict[Tensor, int] = OrderedDict([(CLONE, 1), (MEAN, 2)])
    elements = {CLONE}
    with_own([by_tensor, elements], STAND_INS.own)
    assert [id(key) for key in by_tensor] == [id(WEIGHT), id(MEAN)] and {id(e) for e in elements} == {id(WEIGHT)}
