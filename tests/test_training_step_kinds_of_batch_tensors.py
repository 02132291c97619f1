"""Tensors of other kinds in a batch, and a discriminator that the loss trains: uncaptured they are the ordinary loop's,
captured they are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.small_models import batches, compiled, mlp, torch_loop


class Image(Tensor):
    """As torchvision's: a tensor that says what it is."""


class Scaled(Tensor):
    """Carries a number, and computes otherwise than a tensor."""

    scale = 2.0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        return out + 0.5 if func is F.linear else out


def scaled(x: Tensor) -> Tensor:
    found = x.as_subclass(Scaled)
    found.scale = 3.0
    return found


def of_its_scale(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x) * getattr(x, "scale", 1.0), y)


def dense(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x.to_dense() if x.is_sparse else x.dequantize()), y)


def of_an_image(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y) * (2 if isinstance(x, Image) else 1)


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor], str]] = {
    "a subclass": (lambda x: x.as_subclass(Image), of_an_image, r"batch\[0\] is a Image, .*as_subclass\(torch.Tensor"),
    "with attributes": (scaled, of_its_scale, r"batch\[0\] is a Scaled, and a program takes plain dense tensors"),
    "sparse": (Tensor.to_sparse, dense, r"batch\[0\] is a torch.sparse_coo tensor"),
    "quantized": (
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        dense,
        r"batch\[0\] is a torch.qint8 tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_another_kind(kind: str) -> None:
    make, loss, said = KINDS[kind]
    data = [(make(x), y) for x, y in batches(3)]
    model = mlp()
    wanted = torch_loop(model, data, loss)
    own = mlp()
    step = compiled(own, loss, mode="eager")
    got = [step(*batch) for batch in data]
    for a, b in zip([*got, *own.parameters()], [*wanted, *model.parameters()], strict=True):
        torch.testing.assert_close(Tensor(a), Tensor(b), rtol=2e-5, atol=2e-6)  # AdamW's fused arithmetic rounds so
    for way in ("read", "run"):
        with pytest.raises(TypeError, match=said):
            compiled(mlp(), loss, capture=way)(*data[0])


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


class Adversary:
    """Trains a discriminator in the generator's loss; its weights are clamped."""

    def __init__(self, optimizer: str) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.optimizer = OPTIMIZERS[optimizer](self.critic.parameters())

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        fake = model(x)
        self.optimizer.zero_grad()
        (F.softplus(-self.critic(y)) + F.softplus(self.critic(fake.detach()))).mean().backward()
        self.optimizer.step()
        with torch.no_grad():
            for p in self.critic.parameters():
                p.clamp_(-0.4, 0.4)
        return F.softplus(-self.critic(fake)).mean()

    def looked_at(self) -> list[Tensor]:
        """Weights, their gradients after the step, and what the optimizer keeps."""
        kept = [t for values in self.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
        weights = list(self.critic.parameters())
        return [*weights, *(p.grad for p in weights if p.grad is not None), *kept]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_discriminator_that_the_loss_trains(optimizer: str) -> None:
    model, wanted = mlp(), Adversary(optimizer)
    losses = torch_loop(model, batches(4), wanted)
    own, loss = mlp(), Adversary(optimizer)
    step = compiled(own, loss, mode="eager")
    got = [step(*batch) for batch in batches(4)]
    for a, b in zip(
        [*got, *own.parameters(), *loss.looked_at()], [*losses, *model.parameters(), *wanted.looked_at()], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    with pytest.raises(ValueError, match=r"cannot be captured: it runs on real tensors, but not on .* mode='eager'"):
        compiled(mlp(), Adversary(optimizer))(*batches(1)[0])
