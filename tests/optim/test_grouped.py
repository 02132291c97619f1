"""One transform over several groups of banks: own state, own numbers, everything else as without groups."""

from __future__ import annotations

import torch

from fusion_compile import optim
from fusion_compile.optim._grouped import banks_of, group_of, grouped, in_group
from fusion_compile.optim._transform import BankInfo, Context, Place


def numbers(**own: float) -> Context:
    return Context({name: torch.tensor(value) for name, value in own.items()})


def test_the_group_is_in_the_key_and_the_role_stays_in_front() -> None:
    assert in_group("scalar/float32", "default") == "scalar/float32"
    assert in_group("scalar/float32", "head") == "scalar/float32@head"
    assert (group_of("scalar/float32@head"), group_of("scalar/float32")) == ("head", "default")
    assert banks_of({"a": 1, "a@head": 2, "b@head": 3}, "head") == {"a@head": 2, "b@head": 3}


def test_a_listed_number_is_the_groups_and_an_unlisted_one_the_defaults() -> None:
    sgd = optim.chain(optim.add_decayed_weights(0.5), optim.scale_by_learning_rate(1.0))
    both = grouped(sgd, {"head": {"lr": 0.1}})
    assert dict(both.hyperparameters) == {"weight_decay": 0.5, "lr": 1.0, "head.lr": 0.1}
    params = {"a": torch.ones(2), "a@head": torch.ones(2)}
    gradients = {k: torch.zeros(2) for k in params}
    context = numbers(**{"weight_decay": 0.5, "lr": 1.0, "head.lr": 0.25})
    updates, _ = both.update(gradients, both.init(params), params, context)
    assert {k: t.tolist() for k, t in updates.items()} == {"a": [-0.5, -0.5], "a@head": [-0.125, -0.125]}


def test_each_group_has_a_state_of_its_own_and_an_empty_one_has_none() -> None:
    both = grouped(optim.adamw(), {"head": {}, "tail": {}})
    state = both.init({"a@head": torch.zeros(2), "b@tail": torch.zeros(3)})
    assert list(state) == ["head", "tail"]
    assert list(state["head"][0].mu) == ["a@head"]


def test_the_gradient_point_uses_the_groups_numbers() -> None:
    both = grouped(optim.sf_adamw(), {"head": {"schedule_free_beta": 0.0}})
    params = {"a": torch.ones(2), "a@head": torch.ones(2)}
    state = both.init(params)
    moved = {group: part._replace(z={k: 3.0 * z for k, z in part.z.items()}) for group, part in state.items()}
    context = numbers(**{name: float(value) for name, value in both.hyperparameters.items()})  # type: ignore[arg-type]
    assert both.gradient_point is not None
    point = both.gradient_point(params, moved, context)
    # y = (1 - β) z + β x, with β = 0.9 and with β = 0
    torch.testing.assert_close(point["a"], torch.full((2,), 1.2))
    torch.testing.assert_close(point["a@head"], torch.full((2,), 3.0))


def test_layers_of_all_groups_are_known_when_it_is_bound() -> None:
    """A part that lists a layer finds it although one group has none of its parameters."""
    both = grouped(optim.chain(optim.scale_by_layer({3: 2.0}), optim.scale_by_learning_rate(1.0)), {"head": {}})
    facts = {"scalar": BankInfo((Place("blocks.3.w", (2,), 0),)), "scalar@head": BankInfo((Place("w", (2,), 0),))}
    assert both.bind is not None
    bound = both.bind(facts)
    params = {k: torch.zeros(2) for k in facts}
    context = numbers(**{"layer_weight.3": 2.0, "lr": 1.0})
    updates, _ = bound.update({k: torch.ones(2) for k in facts}, bound.init(params), params, context)
    assert {k: t.tolist() for k, t in updates.items()} == {"scalar": [-2.0, -2.0], "scalar@head": [-1.0, -1.0]}
