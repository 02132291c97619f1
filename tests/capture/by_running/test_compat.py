"""A checkpointed region in a trace: one mask for the loss and its gradient, as in the ordinary loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint

from fusion_compile._capture.by_running._compat import mark_as_parameter, patched
from fusion_compile._capture.by_running.trace import no_checkpoint_is_reentrant, run_on_fakes


class Attention(nn.Module):
    """One head over 8 channels; `p` is the dropout of its weights."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.qkv = p, nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=self.p)


REGIONS: dict[str, Any] = {
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.3)),
    "dropout in place": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5, inplace=True), nn.Linear(8, 8)),
    "channels": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout1d(0.5), nn.Linear(8, 8)),
    "rrelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 8)),
    "attention": lambda: Attention(0.0),
    "attention with dropout": lambda: Attention(0.4),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", REGIONS)
def test_loss_gradient_and_random_stream_are_the_ordinary_loops(name: str, reentrant: bool) -> None:
    block = REGIONS[name]()
    weights = dict(block.named_parameters())

    def loss_and_gradients(x: Tensor, *leaves: Tensor) -> list[Tensor]:
        def region(x: Tensor) -> Tensor:
            return torch.func.functional_call(block, dict(zip(weights, leaves, strict=True)), (x,))

        loss = checkpoint.checkpoint(region, x, use_reentrant=reentrant).square().mean()
        if reentrant and not graph_is_being_made:
            loss.backward()
            return [loss.detach(), *(leaf.grad for leaf in leaves)]
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    x = torch.randn(3, 5, 8, requires_grad=True)
    leaves = [w.detach().clone().requires_grad_() for w in weights.values()]
    graph_is_being_made = True
    graph = run_on_fakes(loss_and_gradients, dict(zip(["x", *weights], [x, *leaves], strict=True)))
    graph_is_being_made = False
    torch.manual_seed(3)
    wanted, stream = loss_and_gradients(x, *leaves), torch.get_rng_state()
    torch.manual_seed(3)
    got = graph(x, *leaves)
    assert torch.equal(torch.get_rng_state(), stream)
    for ours, theirs in zip(got, wanted, strict=True):
        # Attention's composite backward adds in another order than its fused one.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_recomputed_nodes_are_marked() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    def f(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(checkpoint.checkpoint(block, x, use_reentrant=False).sum(), [x]))

    graph = run_on_fakes(f, {"x": torch.randn(2, 8, requires_grad=True)})
    tanh = [n for n in graph.graph.nodes if n.target is torch.ops.aten.tanh.default]
    assert [bool((n.meta.get("custom") or {}).get("recomputed")) for n in tanh] == [False, True]


def test_a_region_with_a_policy_of_its_own_keeps_it() -> None:
    asked = itertools.count()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        next(asked)
        return checkpoint.CheckpointPolicy.MUST_SAVE

    def f(x: Tensor) -> list[Tensor]:
        def contexts() -> Any:
            return checkpoint.create_selective_checkpoint_contexts(policy)

        y = checkpoint.checkpoint(lambda x: (x @ x).tanh(), x, use_reentrant=False, context_fn=contexts)
        return list(torch.autograd.grad(y.sum(), [x]))

    x = torch.randn(3, 3, requires_grad=True)
    graph = run_on_fakes(f, {"x": x})
    assert next(asked) > 0 and sum(n.target is torch.ops.aten.tanh.default for n in graph.graph.nodes) == 1
    assert torch.allclose(graph(x)[0], f(x)[0])


def test_a_region_with_a_policy_of_its_own_has_one_mask() -> None:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> checkpoint.CheckpointPolicy:
        kept = op is torch.ops.aten.mm.default
        return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def f(x: Tensor) -> list[Tensor]:
        def region(x: Tensor) -> Tensor:
            return nn.functional.dropout((x @ x).tanh(), 0.5).square() @ x

        def contexts() -> Any:
            return checkpoint.create_selective_checkpoint_contexts(policy)

        y = checkpoint.checkpoint(region, x, use_reentrant=False, context_fn=contexts)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x])]

    x = torch.randn(4, 4, requires_grad=True)
    graph = run_on_fakes(f, {"x": x})
    torch.manual_seed(3)
    wanted = f(x)
    torch.manual_seed(3)
    torch.testing.assert_close(graph(x), wanted)


def test_an_own_and_an_inherited_attribute_come_back_after_an_error() -> None:
    class Base:
        limit = 1

    class Derived(Base):
        own = 2

    with pytest.raises(ZeroDivisionError), patched(Derived, "own", 5), patched(Derived, "limit", 6):
        assert (Derived.own, Derived.limit, Base.limit) == (5, 6, 1)
        raise ZeroDivisionError
    assert Derived.own == 2 and "limit" not in vars(Derived)


def test_reentrant_checkpointing_gives_gradients_to_autograd_grad_only_inside() -> None:
    x = torch.ones(2, requires_grad=True)

    def gradient() -> Tensor:
        return torch.autograd.grad(checkpoint.checkpoint(torch.exp, x, use_reentrant=True).sum(), x)[0]

    with no_checkpoint_is_reentrant():
        assert torch.equal(gradient(), x.detach().exp())
    with pytest.raises(RuntimeError, match="reentrant"):
        gradient()


def test_a_tensor_that_is_marked_passes_for_a_parameter() -> None:
    tensor = torch.ones(2)
    assert not isinstance(tensor, nn.Parameter)
    mark_as_parameter(tensor)
    assert isinstance(tensor, nn.Parameter) and type(tensor) is Tensor
