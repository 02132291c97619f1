"""The graphs of one call, and the tensors that it reaches as they were."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.explain._run.captured import capture, modules_within, put_back


def test_each_part_between_breaks_is_a_graph_in_the_order_of_the_run() -> None:
    def program(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    programs = capture(program, (torch.ones(2),), {})
    calls = [[n.target for n in p.graph.graph.nodes if n.op in ("call_method", "call_function")] for p in programs]
    assert calls == [["sin"], ["cos"]]


def test_tensors_that_a_call_reaches_have_their_old_values_also_after_an_error() -> None:
    module, x = nn.BatchNorm1d(2), torch.tensor([[1.0, 2.0], [3.0, 5.0]])

    def program(x: Tensor) -> Tensor:
        module(x)
        return x.mul_(2)

    random = torch.get_rng_state()
    capture(program, (x,), {})
    assert x.tolist() == [[1, 2], [3, 5]] and module.running_mean is not None
    assert module.running_mean.tolist() == [0, 0] and int(module.num_batches_tracked or 0) == 0
    with pytest.raises(ZeroDivisionError), put_back(program, (x,), {}):
        x.fill_(7)
        torch.rand(3)
        raise ZeroDivisionError
    assert x.tolist() == [[1, 2], [3, 5]]
    assert torch.equal(torch.get_rng_state(), random)


def test_modes_and_what_is_trainable_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2))
    model[0].eval()

    def freeze() -> None:
        model.train()
        model[1].requires_grad_(False)

    with put_back(model, (), {}):
        freeze()
    assert (model.training, model[0].training, model[1].weight.requires_grad) == (True, False, True)


IN_GLOBALS = nn.Linear(1, 1)


def test_modules_are_found_where_a_callable_may_reach_them() -> None:
    closed_over, given = nn.Linear(2, 2), nn.Linear(3, 3)

    def program(module: nn.Module) -> object:
        return IN_GLOBALS, closed_over, module

    assert set(modules_within(program, (given, given), {})) == {given, closed_over, IN_GLOBALS}
    assert modules_within(given, (), {}) == (given,)
    assert modules_within(given.forward, (), {}) == (given,)


def test_torchs_words_about_a_graph_break_stay_out_of_it() -> None:
    """The findings tell of it. Whoever asked for Dynamo's log gets it."""
    log = logging.getLogger("torch._dynamo")
    seen: list[int] = []

    def looks(x: Tensor) -> Tensor:
        seen.append(log.level)
        return x + float(x.sum())

    before = log.level
    capture(looks, (torch.ones(2),), {})
    assert set(seen) == {logging.ERROR} and log.level == before
    try:
        log.setLevel(logging.INFO)
        capture(looks, (torch.ones(2),), {})
        assert seen[-1] == logging.INFO and log.level == logging.INFO
    finally:
        log.setLevel(before)
