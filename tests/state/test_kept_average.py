"""Averages that a step keeps: their tensors by name in a flat state, and what `ema=` may be given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile._state import keys
from fusion_compile._state.banks import build_layout
from fusion_compile._state.kept_average import KeptAverage, averages_of, banks_of, parameters_of, views_of
from fusion_compile._state.routing import route
from fusion_compile.optim import Average


def test_views_of_the_state_and_parameters_of_the_model_have_the_same_names() -> None:
    model = nn.Linear(3, 2)
    layout = build_layout(model, route(model, ("scalar",), (), ()))
    banks = layout.join({n: p.detach() for n, p in model.named_parameters()})
    state = {keys.optimizer(f"averages/slow/{key}"): bank for key, bank in banks.items()}
    average = KeptAverage(Average("slow"), model)
    average.held_by(model, layout.views(banks_of(average.average, layout, state)))
    views, parameters = views_of([average], layout, state), parameters_of([average])
    assert views.keys() == parameters.keys() == {"slow.model.weight", "slow.model.bias"}
    for name, view in views.items():
        assert torch.equal(view, parameters[name]) and view.data_ptr() == parameters[name].data_ptr()
        assert parameters[name].untyped_storage().nbytes() == parameters[name].numel() * 4


def test_what_a_step_may_be_given() -> None:
    one, two = KeptAverage(Average("one"), None), KeptAverage(Average("two"), None)
    assert averages_of(one) == (one,) and averages_of([one, two]) == (one, two) and averages_of(()) == ()
    with pytest.raises(ValueError, match="two averages are called 'one'"):
        averages_of([one, one])
