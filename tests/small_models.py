"""Models of a few dozen weights, the ordinary torch loop to compare with, and a step's state as bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._state import checkpoint

PROGRAMS: dict[str, dict[str, Any]] = {"eager": {"mode": "eager"}, "captured": {"backend": "aot_eager"}}
"""The two ways to run a step here: uncompiled, and as one graph of ATen operators without Inductor's minutes."""


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """4 -> 8 -> 2, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def batches(count: int, size: int = 8, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Inputs ``[size, 4]`` and targets ``[size, 2]``, always the same."""
    source = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 4, generator=source).to(dtype), torch.randn(size, 2, generator=source).to(dtype))
        for _ in range(count)
    ]


def squared_error(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(model(x), y)


def compiled(model: nn.Module, loss_fn: Callable[..., Any] = squared_error, **options: Any) -> fc.TrainingStep:
    """A captured AdamW step, unless `options` say otherwise."""
    return fc.compile_training_step(model, loss_fn, **{"optimizer": "adamw", "backend": "aot_eager", **options})


def torch_loop(
    model: nn.Module,
    data: Iterable[tuple[Any, ...]],
    loss_fn: Callable[..., Tensor] = squared_error,
    **options: Any,
) -> list[Tensor]:
    """The ordinary loop: autograd and ``torch.optim.AdamW``, whose defaults are the recipe's; the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **options)
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_fn(model, *batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def bits(step: fc.TrainingStep) -> dict[str, bytes]:
    """All that a step may change, as bytes, which unlike numbers compare equal when both are nan: what it would save
    (but the random state), the module's own tensors and the buffers that a checkpoint leaves out."""
    # Not step.state_dict(), which refuses where a test has taken the model's parameters away.
    saved = checkpoint.state_dict(step.model, step.layout, step._state, step.hyperparameters, step.steps_called)
    found = {f"{part}/{n}": t for part in ("model", "optimizer", "counts", "buffers") for n, t in saved[part].items()}
    found |= {f"module/{n}": t for n, t in (*step.model.named_parameters(), *step.model.named_buffers())}
    found["hyperparameters"] = step.hyperparameters.tensor
    return {n: tensor_bits(t) for n, t in found.items()} | {"steps_called": bytes(str(step.steps_called), "ascii")}


def tensor_bits(tensor: Tensor) -> bytes:
    """The entries of a tensor of any dtype as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differing(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """The names under which `one` and `other` differ, or that only one of them has."""
    return sorted(n for n in {*one, *other} if one.get(n) != other.get(n))


def naming(name: str) -> Callable[[str], str]:
    """A message for `torch.testing.assert_close` that begins with `name`."""
    return lambda message: f"{name}: {message}"


def assert_same_weights(model: nn.Module, reference: nn.Module, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Every entry of both state dicts close: by default to a few roundings of fp32, as another order of sums makes."""
    for (name, ours), (_, theirs) in zip(
        sorted(model.state_dict().items()), sorted(reference.state_dict().items()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=naming(name))
