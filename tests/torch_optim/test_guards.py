"""Who evaluates or saves y is told, whichever part of the model is called, and nobody else is."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.callback
from torch import nn

from fusion_compile._torch_optim.guards import owners_of
from fusion_compile.torch_optimizer import TorchOptimizer
from tests.small_models import batches
from tests.torch_loops import equal, made, weights


class Outer(nn.Module):
    """A module around the net, as LightningModules are, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.net(x) * self.scale
        return y


def stepped(of: Callable[[Outer], Any] = lambda outer: outer, name: str = "sf_adamw") -> tuple[Outer, TorchOptimizer]:
    outer = Outer()
    optimizer = made(of(outer), name)
    go_on(outer, optimizer)
    return outer, optimizer


def go_on(outer: Outer, optimizer: TorchOptimizer) -> None:
    x, y = batches(1)[0]
    optimizer.zero_grad()
    (outer(x) - y).square().mean().backward()
    optimizer.step()


def hooks(outer: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._state_dict_pre_hooks) for m in outer.modules())


X = torch.ones(2, 4)
OF: dict[str, Callable[[Outer], Any]] = {
    "the model": lambda outer: outer,
    "named parameters": lambda outer: outer.named_parameters(),
    "plain parameters": lambda outer: outer.parameters(),
    "groups": lambda outer: [{"params": outer.net.parameters()}, {"params": [outer.scale]}],
}
EVALUATES: dict[str, Callable[[Outer], Any]] = {
    "the model": lambda outer: outer.eval()(X),
    "a submodule": lambda outer: outer.eval().net(X),
    "a layer": lambda outer: outer.eval().net[0](X),
}
SAVES: dict[str, Callable[[Outer], Any]] = {
    "state_dict": lambda outer: outer.state_dict(),
    "a part's state_dict": lambda outer: outer.net.state_dict(),
    "a layer's state_dict": lambda outer: outer.net[2].state_dict(),
    "pickle": pickle.dumps,
}


@pytest.mark.parametrize("of", OF)
@pytest.mark.parametrize("what", [*EVALUATES, *SAVES])
@pytest.mark.covering(
    "the model",
    "a layer-groups",
    "a layer's state_dict-plain parameters",
    "pickle-named parameters",
    "a submodule-plain parameters",
)
def test_y_is_not_evaluated_or_saved_without_a_word(of: str, what: str) -> None:
    outer, optimizer = stepped(OF[of])
    call = {**EVALUATES, **SAVES}[what]
    words = (
        "saved|taken|pickled" if what in SAVES else r"the model is evaluated .* Schedule-Free's y, not the average x"
    )
    with pytest.warns(UserWarning, match=words) as said:
        call(outer)
        call(outer)
    assert len(said) == 1
    outer.train()
    optimizer.eval()
    fresh_outer, fresh = stepped(OF[of])
    fresh.eval()
    call(fresh_outer)  # a warning is an error here
    assert hooks(fresh_outer) == 0, "hooks keep torch from its fast paths of inference"
    fresh.train()
    with pytest.warns(UserWarning, match=words):
        call(fresh_outer)


def test_training_is_not_evaluating_even_with_a_frozen_batch_norm() -> None:
    outer, optimizer = stepped()
    outer.net[1].eval()
    for _ in range(2):
        go_on(outer, optimizer)
    with torch.no_grad():
        outer(X)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_where_the_parameters_are_the_weights_nothing_hangs_on_the_model(name: str) -> None:
    outer, _ = stepped(name=name)
    assert hooks(outer) == 0
    outer.state_dict()
    outer.eval()(X)


def test_nekaons_point_is_not_called_schedule_frees() -> None:
    outer, optimizer = stepped(name="nekaon")
    with pytest.warns(UserWarning, match="the model's weights are the point at which nekaon takes its gradient, not"):
        outer.state_dict()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="the weights are those to deploy, but the gradient belongs at the point"):
        go_on(outer, optimizer)


def test_the_guards_go_with_their_optimizer() -> None:
    outer, optimizer = stepped()
    assert hooks(outer) > 0
    del optimizer
    gc.collect()
    assert hooks(outer) == 0
    outer.eval()(X)


def test_a_group_that_joins_is_guarded() -> None:
    outer, optimizer = stepped(lambda outer: outer.net[0].named_parameters())
    optimizer.add_param_group({"params": outer.net[2].named_parameters()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer.net[2].state_dict()  # still what it was
    go_on(outer, optimizer)
    with pytest.warns(UserWarning, match="state_dict"):
        outer.net[2].state_dict()


def test_the_guards_are_in_nobodys_way() -> None:
    outer, optimizer = stepped()
    compiled = torch.compile(outer, fullgraph=True, backend="eager")
    outer.eval()
    with pytest.warns(UserWarning, match="the model is evaluated"):
        value = compiled(X)
    with pytest.warns(UserWarning, match="the model was pickled"):
        pickled = pickle.dumps(outer)
    for other in (copy.deepcopy(outer), pickle.loads(pickled)):
        assert torch.equal(other(X), value) and equal(weights(other), weights(outer))  # and warns of nothing
        other.state_dict()
    outer.train()
    del optimizer


def compiled_in_place(outer: Outer) -> Outer:
    outer.compile(backend="eager")
    return outer


COMPILED: dict[str, Callable[[Outer], Any]] = {
    "torch.compile(model)": lambda outer: torch.compile(outer, backend="eager"),
    "model.compile()": compiled_in_place,
    "a part of it": lambda outer: torch.compile(outer.net, backend="eager"),
    "a function that calls it": lambda outer: torch.compile(lambda x: outer(x), backend="eager"),
}


@pytest.mark.parametrize("how", COMPILED)
def test_a_model_that_is_compiled_after_the_first_step_is_guarded(how: str) -> None:
    outer, optimizer = stepped()
    torch.compiler.reset()  # forgets who listens
    go_on(outer, optimizer)
    call = COMPILED[how](outer)
    call(X)  # in training mode; a warning is an error here
    outer.eval()
    with pytest.warns(UserWarning, match=r"the model is evaluated .* Schedule-Free's y, not the average x") as said:
        call(X)
        call(X)
    assert len(said) == 1


def test_nothing_listens_to_the_compiler_without_an_optimizer_at_y() -> None:
    def listening() -> int:
        return len(torch._dynamo.callback.callback_handler.start_callbacks)

    gc.collect()
    before = listening()
    outer, optimizer = stepped()
    assert listening() == before + 1
    optimizer.eval()
    assert listening() == before
    compiled: Any = torch.compile(outer.eval(), backend="eager")
    compiled(X)  # a warning is an error here
    optimizer.train()
    assert listening() == before + 1
    del optimizer
    gc.collect()
    assert listening() == before


def test_a_compiled_model_is_guarded_too() -> None:
    """The hooks of its layers are traced with them."""
    outer = Outer()
    compiled: Any = torch.compile(outer, backend="eager")
    optimizer = made(outer, "sf_adamw")
    go_on(compiled, optimizer)
    compiled.eval()
    with pytest.warns(UserWarning, match="the model is evaluated") as said:
        compiled(X)
        compiled(X)
    assert len(said) == 1
    fresh = made(again := Outer(), "sf_adamw")
    compiled = torch.compile(again, backend="eager")
    go_on(compiled, fresh)
    fresh.eval()
    compiled.eval()(X)  # a warning is an error here
    fresh.train()
    with pytest.warns(UserWarning, match="the model's state_dict"):
        compiled.state_dict()


def test_a_copy_has_guards_of_its_own() -> None:
    outer, optimizer = copy.deepcopy(stepped())
    optimizer.eval()
    outer.state_dict()
    optimizer.train()
    with pytest.warns(UserWarning, match="state_dict"):
        outer.state_dict()


def test_owners_are_found_in_the_model_first_and_else_among_all_modules() -> None:
    outer = Outer()
    ids = {id(p) for p in outer.parameters()}
    assert {id(m) for m in owners_of(ids, outer)} == {id(m) for m in owners_of(ids, None)}
    assert {type(m) for m in owners_of(ids, None)} == {Outer, nn.Linear, nn.BatchNorm1d}
    assert [type(m) for m in owners_of({id(outer.scale)}, nn.Linear(1, 1))] == [Outer]
    assert owners_of({id(nn.Parameter(torch.ones(1)))}, None) == []
