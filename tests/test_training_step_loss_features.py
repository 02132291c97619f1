"""What a loss may contain: all of it becomes one graph, and trains as autograd and torch.optim do.

The graph here is that of AOTAutograd, run operator by operator: it draws random numbers in the ordinary loop's order,
so that dropout and noise too can be compared number by number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.parametrizations import orthogonal
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from tests.small_models import assert_same_weights, batches, compiled, naming, squared_error, torch_loop

STEPS = 6


class OldSquare(Function):
    """x² with a gradient of its own, in the style with ctx in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * gradient  # 3 and not 2: only who calls this backward gets it


class NewSquare(Function):
    """The same in the style with setup_context."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * gradient


class Squared(nn.Module):
    def __init__(self, function: type[Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class SelfAttention(nn.Module):
    """The batch as a sequence, two heads of width 4, causal."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(1, len(x), 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(len(x), 8)


class Checkpointed(nn.Module):
    """Two layers whose activations are computed again in the backward pass."""

    def __init__(self, again: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False) if self.again else self.layers(x)


class CountedByAssignment(nn.Module):
    """A buffer that is replaced in each forward, one that is written in place, and one that no state dict holds."""

    calls: Tensor
    mean: Tensor
    unsaved: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("unsaved", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.mean.lerp_(x.detach().mean(0), 0.1)
        self.unsaved = 0.5 * self.unsaved + self.mean
        return x + self.unsaved


def _hooked() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.register_forward_hook(lambda module, args, out: out * 2)
    layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return layer


def autocast_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    return F.mse_loss(out.float(), y)


def flow_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Noise and timesteps drawn on the device."""
    t = torch.rand(len(x), 1, device=x.device)
    e = torch.randn_like(x)
    return F.mse_loss(model((1 - t) * x + t * e), y * t)


def gradient_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loss that differentiates inside: its gradient goes through that gradient."""
    x = x.detach().requires_grad_()
    out = model(x)
    (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    return F.mse_loss(out, y) + slope.square().mean()


FEATURES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "dropout": (lambda: nn.Dropout(0.5), squared_error),
    "batch norm": (lambda: nn.BatchNorm1d(8), squared_error),
    "instance norm with statistics": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, affine=True, track_running_stats=True), nn.Flatten()
        ),
        squared_error,
    ),
    "autocast": (lambda: nn.Linear(8, 8), autocast_error),
    "scaled dot-product attention": (SelfAttention, squared_error),
    "autograd function, ctx in forward": (lambda: Squared(OldSquare), squared_error),
    "autograd function, setup_context": (lambda: Squared(NewSquare), squared_error),
    "checkpointing": (Checkpointed, squared_error),
    "noise and timesteps": (lambda: nn.Identity(), flow_error),
    "buffers assigned anew": (CountedByAssignment, squared_error),
    "forward hooks": (_hooked, squared_error),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), squared_error),
    "a loss that differentiates": (lambda: nn.Tanh(), gradient_penalty),
}


def around(part: nn.Module) -> nn.Module:
    """`part` between two layers, always with the same weights."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), part, nn.Linear(8, 2))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does, of a Function
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.covering(
    "dropout", "batch norm", "autocast", "checkpointing", "autograd function, ctx in forward", "forward hooks"
)
def test_it_is_captured_in_one_graph_and_trains_as_the_ordinary_loop(feature: str) -> None:
    make, loss_fn = FEATURES[feature]
    model, reference = around(make()), around(make())
    # A bias before a batch norm, and the key's in attention, have no gradient but rounding; this eps keeps Adam from
    # making steps of size lr of it.
    step = compiled(model, loss_fn, optimizer=fc.optim.adamw(eps=1e-3))
    data = batches(STEPS)

    torch.manual_seed(3)
    losses = [step(*batch) for batch in data]
    torch.manual_seed(3)
    expected = torch_loop(reference, data, loss_fn, eps=1e-3)

    assert len(step.programs) == 1
    # bf16 keeps 8 bits: a product that rounds the other way moves a gradient by 1 %, and so a step of lr = 1e-3.
    loose = {"rtol": 1e-2, "atol": 1e-4} if loss_fn is autocast_error else {}
    assert_same_weights(model, reference, **loose)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=loose.get("rtol", 1e-5), atol=1e-6)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=naming(name))


def _operators(model: nn.Module, name: str) -> Counter[str]:
    """The operators that the backend is given for one step of `model`."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.registry import register_backend

    seen: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        seen.update(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    register_backend(aot_autograd(fw_compiler=count, bw_compiler=count, inference_compiler=count), name=name)
    compiled(model, backend=name)(*batches(1)[0])
    return seen


def test_checkpointed_activations_are_computed_again_in_the_captured_graph() -> None:
    """What is kept is the input of the two layers: each of their tanh runs twice, and of their products all but the
    last, whose result no gradient needs."""
    plain = _operators(around(Checkpointed(again=False)), "count_plain")
    again = _operators(around(Checkpointed(again=True)), "count_again")
    assert plain["aten.tanh.default"] == 2
    assert again["aten.tanh.default"] == 4
    assert again["aten.addmm.default"] >= plain["aten.addmm.default"] + 2


def test_batch_norm_statistics_come_back_when_a_step_is_skipped() -> None:
    model = around(nn.BatchNorm1d(8))
    step = compiled(model)
    (x, y), other = batches(2)
    step(x, y)
    before = {n: b.clone() for n, b in model.named_buffers()}
    step(x, y * float("inf"))
    assert int(step.metrics["skipped"]) == 1
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    step(*other)
    assert not any(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_noise_differs_from_step_to_step_and_repeats_with_the_seed() -> None:
    def noise(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        e = torch.randn_like(x)
        return model(e).square().mean(), {"noise": e}

    step = compiled(around(nn.Identity()), noise)
    x = torch.zeros(3, 4)

    def draw(seed: int, count: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [(step(x), step.metrics["noise"])[1] for _ in range(count)]

    first, second, third = draw(0, 3)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert all(torch.equal(a, b) for a, b in zip(draw(0, 3), (first, second, third), strict=True))


@pytest.mark.filterwarnings("ignore:the step is captured by running it")
def test_a_draw_that_is_used_by_nothing_still_draws() -> None:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        kept = x
        for _ in range(2):  # the last state of a recurrent net
            x, kept = x + 0.1 * kept, torch.where(torch.rand_like(kept) < 0.5, x, kept)
        return F.mse_loss(model(x), y)

    model, reference = around(nn.Identity()), around(nn.Identity())
    step = compiled(model, loss)
    torch.manual_seed(0)
    torch_loop(reference, batches(2), loss)
    wanted = torch.rand(1)
    torch.manual_seed(0)
    for batch in batches(2):
        step(*batch)
    assert torch.equal(torch.rand(1), wanted)
    assert_same_weights(model, reference)


def test_capture_draws_no_random_number_of_the_users() -> None:
    """The first call, which compiles, draws what later calls draw and no more."""
    states = []
    step = compiled(around(nn.Dropout(0.5)), flow_error)
    for _ in range(3):
        torch.manual_seed(0)
        step(*batches(1)[0])
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[1], states[2])


def test_the_loss_may_take_nested_batches_and_keep_tensors_of_its_own() -> None:
    shift = torch.full((2,), 0.5)

    def loss(model: nn.Module, batch: dict[str, Any], flag: bool, nothing: None) -> Tensor:
        x, (y,) = batch["x"], batch["rest"]
        return F.mse_loss(model(x) + shift, y) if flag else model(x).sum()

    def flat(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(model(x) + shift, y)

    model, reference = around(nn.Tanh()), around(nn.Tanh())
    step = compiled(model, loss)
    for x, y in batches(STEPS):
        step({"x": x, "rest": [y]}, True, None)
    torch_loop(reference, batches(STEPS), flat)
    assert len(step.programs) == 1
    assert_same_weights(model, reference)


def test_two_steps_share_a_process_without_sharing_programs() -> None:
    """As a generator and its critic do; their code is one, and Dynamo counts its compilations by code."""
    steps = [compiled(around(nn.Tanh())) for _ in range(2)]
    for x, y in batches(STEPS):
        losses = [float(step(x, y)) for step in steps]
        assert losses[0] == losses[1]
    assert [len(step.programs) for step in steps] == [1, 1]


@pytest.mark.filterwarnings("ignore:the step is captured by running it, because model.1._forward_hooks")
def test_an_activation_hook_sees_every_step_and_keeps_no_graph() -> None:
    """Values that leave the model through a hook, detached: what a metric does better, but it must not break."""
    model = around(nn.Tanh())
    seen: dict[str, Tensor] = {}
    model.get_submodule("1").register_forward_hook(lambda module, args, out: seen.__setitem__("out", out.detach()))
    step = compiled(model)
    values = []
    with pytest.warns(UserWarning, match=r"captured by running it, because .*<seen>\['out'\] changes at every forward"):
        step(*batches(1)[0])
    for batch in batches(3):
        step(*batch)
        values.append(seen["out"].clone())
    assert type(values[0]) is Tensor and values[0].shape == (8, 8)
    assert not torch.equal(values[0], values[1]) and not torch.equal(values[1], values[2])


class Cayley(nn.Module):
    """torch's orthogonal parametrization by Cayley's map, which solves a linear system in every forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.last = orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x).tanh())
        return out


def of_its_spectrum(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    gram = model(x).mT @ model(x) + torch.eye(2)
    values, logarithm = torch.linalg.eigh(gram)[0], torch.linalg.slogdet(gram)[1]
    return squared_error(model, x, y) + 0.01 * (values.square().sum() + logarithm + torch.linalg.inv(gram).sum())


@pytest.mark.parametrize("options", [{}, {"capture": "run"}], ids=["read", "run"])
def test_linear_solvers_train_on_a_cpu(options: dict[str, Any]) -> None:
    mine, reference = Cayley(), Cayley()
    step = compiled(mine, of_its_spectrum, lr=1e-2, **options)
    losses = [step(*batch) for batch in batches(3)]
    expected = torch_loop(reference, batches(3), of_its_spectrum, lr=1e-2)
    # A solver's rounding grows with the condition of what it solves, which is below a hundred here.
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)
