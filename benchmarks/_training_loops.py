"""The diffusion problem that steps are timed on, and the ordinary ways to train on it.

Every contender gets the same architecture, the same loss and a batch of the same shapes, and does the same work:
forward, backward, one update of every parameter, the loss left on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from dit import DiT, dit_b_2, dit_s_2, dit_xl_2
from torch import Tensor, nn

LossFn = Callable[..., Tensor]
Step = Callable[..., Tensor]

MODELS: dict[str, Callable[[], DiT]] = {
    "small": lambda: DiT(8, 2, 1, hidden_size=128, depth=4, num_heads=4),
    "dit_s_2": dit_s_2,
    "dit_b_2": dit_b_2,
    "dit_xl_2": dit_xl_2,
}
"""By the name that ``--model`` takes; "small" is the demonstration's, for 8x8 images."""


def build(make: Callable[[], DiT], device: torch.device, seed: int = 0) -> DiT:
    """A model in training mode, always with the same weights, none zero: adaLN-zero starts with gradients of zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
    return model.to(device)


class ImageShape(NamedTuple):
    """Of the images or latents that a model takes."""

    channels: int
    side: int
    classes: int


def image_shape(model: DiT) -> ImageShape:
    tokens = model.pos_embed.shape[1]
    return ImageShape(model.in_channels, int(tokens**0.5) * model.patch_size, model.num_classes or 1)


def images(model: DiT, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images ``[size, C, H, W]`` and labels ``[size]``."""
    shape = image_shape(model)
    source = torch.Generator().manual_seed(1000 + seed)
    x = torch.randn(size, shape.channels, shape.side, shape.side, generator=source)
    if size <= shape.classes:
        # All different: where labels repeat, a GPU adds their gradients in any order, and no two runs are alike.
        y = torch.randperm(shape.classes, generator=source)[:size]
    else:
        y = torch.randint(0, shape.classes, (size,), generator=source)
    return x.to(device), y.to(device)


def images_noise_and_times(model: DiT, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """(images, noise, time, labels): with these the loss draws nothing."""
    x, y = images(model, size, device, seed)
    source = torch.Generator().manual_seed(2000 + seed)
    noise, t = torch.randn(x.shape, generator=source), torch.rand(size, generator=source)
    return x, noise.to(device), t.to(device), y


def loss_given_noise(model: nn.Module, x: Tensor, e: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Rectified flow: the mean squared error of the predicted velocity e - x."""
    s = t[:, None, None, None]
    return F.mse_loss(model((1 - s) * x + s * e, t, y).float(), e - x)


def loss_drawing_noise(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The same with noise and time drawn on the device."""
    return loss_given_noise(model, x, torch.randn_like(x), torch.rand(len(x), device=x.device), y)


def in_bfloat16(loss_fn: LossFn) -> LossFn:
    """`loss_fn` under bfloat16 autocast."""

    def loss(model: nn.Module, *batch: Tensor) -> Tensor:
        with torch.autocast(batch[0].device.type, torch.bfloat16):
            return loss_fn(model, *batch)

    return loss


class Loop(NamedTuple):
    """An ordinary training step and the memory it keeps between two steps."""

    step: Step
    kept: Callable[[], Iterator[Tensor]]


def compiled_model_loop(
    model: nn.Module, loss_fn: LossFn, *, mode: str | None = None, backend: str = "inductor", lr: float = 1e-3
) -> Loop:
    """``torch.compile(model)`` and fused AdamW: the loop that people write."""
    compiled = torch.compile(model, mode=mode, backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step(*batch: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        loss = loss_fn(compiled, *batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Loop(step, lambda: _kept(model, optimizer))


def manual_graph_loop(
    model: nn.Module,
    loss_fn: LossFn,
    batch: tuple[Tensor, ...],
    *,
    mode: str | None = None,
    backend: str = "inductor",
    lr: float = 1e-3,
) -> Loop:
    """Forward, backward and capturable fused AdamW in a hand-made ``torch.cuda.graph``; on a CPU not captured.

    `mode`: of ``torch.compile(model)``, one without CUDA graphs of its own. `batch`: has the shapes of all batches.
    """
    compiled = torch.compile(model, mode=mode, backend=backend)
    device = batch[0].device
    capturable = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=capturable)
    held = tuple(t.clone() for t in batch)

    def once() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(compiled, *held)
        loss.backward()
        optimizer.step()
        return loss.detach()

    if not capturable:

        def run(*batch: Tensor) -> Tensor:
            for to, given in zip(held, batch, strict=True):
                to.copy_(given)
            return once()

        return Loop(run, lambda: _kept(model, optimizer))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        loss = once()

    def replay(*batch: Tensor) -> Tensor:
        for to, given in zip(held, batch, strict=True):
            to.copy_(given)
        graph.replay()
        return loss.clone()

    return Loop(replay, lambda: _kept(model, optimizer))


def _kept(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for state in optimizer.state.values():
        yield from (t for t in state.values() if isinstance(t, Tensor))
