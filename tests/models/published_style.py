"""Denoisers as people publish them, in plain PyTorch: other names, other norms and other tensors than ours.

None of their attributes, and few of their arguments, are called what the examples' DiT calls them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(values: Tensor, width: int) -> Tensor:
    """``[B]`` -> ``[B, width]``, periods from 1 to 10,000."""
    steps = torch.arange(0, width // 2, dtype=torch.float32, device=values.device)
    angles = values[:, None].float() * torch.exp(-math.log(10000) * steps / (width // 2))[None]
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)


class NoiseClock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inwards, self.outwards = nn.Linear(32, width), nn.Linear(width, width)

    def forward(self, when: Tensor) -> Tensor:
        return self.outwards(F.silu(self.inwards(sinusoids(when, 32))))


class SelfMix(nn.Module):
    """Attention written out, softmax and all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor, turn: tuple[Tensor, Tensor] | None = None, causal: bool = False) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.to_qkv(tokens).chunk(3, dim=-1)
        )
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        return self.back((scores.softmax(-1) @ v).transpose(1, 2).flatten(-2))


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)


class PublishedDiT(nn.Module):
    """In the style of Peebles and Xie's code: int64 time, label dropout, a learned variance as further channels, and
    guidance in a method of the model's that evaluates both halves of a doubled batch."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 2, 2)
        self.where = nn.Parameter(torch.zeros(1, 16, width), requires_grad=False)
        self.clock = NoiseClock(width)
        self.class_book = nn.Embedding(classes + 1, width)
        self.trunk = nn.ModuleList(
            nn.ModuleDict(
                {
                    "mix": SelfMix(width, heads),
                    "feed": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)),
                    "knobs": nn.Linear(width, 6 * width),
                }
            )
            for _ in range(depth)
        )
        self.last_knobs, self.readout = nn.Linear(width, 2 * width), nn.Linear(width, 2 * 2 * 8)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT + self.where
        c = F.silu(self.clock(t) + self.class_book(y))
        layer: Any
        for layer in self.trunk:
            a, b, g, d, e, f = layer["knobs"](c).unsqueeze(1).chunk(6, dim=2)
            h = h + g * layer["mix"](F.layer_norm(h, h.shape[-1:]) * (1 + b) + a)
            h = h + f * layer["feed"](F.layer_norm(h, h.shape[-1:]) * (1 + e) + d)
        shift, scale = self.last_knobs(c).chunk(2, dim=1)
        h = self.readout(F.layer_norm(h, h.shape[-1:]) * (1 + scale[:, None]) + shift[:, None])
        return torch.einsum("bhwpqc->bchpwq", h.reshape(-1, 4, 4, 2, 2, 8)).reshape(-1, 8, 8, 8)

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        eps, rest = out[:, :4], out[:, 4:]
        asked, null = eps.chunk(2)
        guided = null + cfg_scale * (asked - null)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


class Guided(nn.Module):
    """`forward_with_cfg` as a module's forward, which is what a sampler stands in for."""

    def __init__(self, inner: PublishedDiT, cfg_scale: float) -> None:
        super().__init__()
        self.inner, self.cfg_scale = inner, cfg_scale

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.inner.forward_with_cfg(x, t, y, self.cfg_scale)


class PublishedSiT(nn.Module):
    """In the style of SiT's later descendants: time in [0, 1] on the velocity's scale, RMS norms, gated feed-forward,
    rotary positions computed in float64 in every forward, one modulation shared by all blocks plus a bias for each."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.head_width = width // heads
        self.stem = nn.Linear(16, width)
        self.noise_level = NoiseClock(width)
        self.concept = nn.Embedding(classes, width)
        self.shared = nn.Linear(width, 6 * width, bias=False)
        self.offsets = nn.ParameterList(torch.zeros(6, width) for _ in range(depth))
        self.mixers = nn.ModuleList(SelfMix(width, heads) for _ in range(depth))
        self.gates = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.closers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.finish = nn.Linear(width, 16)

    def turns(self, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        pace = 100.0 ** (-torch.arange(self.head_width // 2, dtype=torch.float64, device=device) / self.head_width)
        angles = torch.arange(n, dtype=torch.float64, device=device)[:, None] * pace
        return angles.cos().float(), angles.sin().float()

    def forward(self, xt: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        h = self.stem(F.pixel_unshuffle(xt, 2).flatten(2).mT)
        turn = self.turns(h.shape[1], h.device)
        level = self.shared(F.silu(self.noise_level(1000 * sigma) + self.concept(label))).unflatten(-1, (6, -1))
        for mix, gate, close, offset in zip(self.mixers, self.gates, self.closers, self.offsets, strict=True):
            a, b, g, d, e, f = (level + offset[None])[:, :, None].unbind(1)
            h = h + g * mix(F.rms_norm(h, h.shape[-1:]) * (1 + b) + a, turn)
            left, right = gate(F.rms_norm(h, h.shape[-1:]) * (1 + e) + d).chunk(2, dim=-1)
            h = h + f * close(F.silu(left) * right)
        return F.pixel_shuffle(self.finish(h).mT.unflatten(2, (4, 4)), 2)


class ActionHead(nn.Module):
    """A policy's flow-matching head: a causal trunk over a chunk of actions, which reads a language model's observation
    tokens by cross-attention and hears the time by FiLM (a scale and a shift of each block's features)."""

    def __init__(self, width: int = 16, depth: int = 2, heads: int = 2, seen: int = 12, actions: int = 5) -> None:
        super().__init__()
        self.heads = heads
        self.lift, self.lower = nn.Linear(actions, width), nn.Linear(width, actions)
        self.position = nn.Parameter(torch.zeros(8, width))
        self.body_state = nn.Linear(7, width)
        self.clock = NoiseClock(width)
        self.film = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.causal = nn.ModuleList(SelfMix(width, heads) for _ in range(depth))
        self.ask = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.seen = nn.ModuleList(nn.Linear(seen, 2 * width) for _ in range(depth))
        self.think = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, noisy_actions: Tensor, tau: Tensor, obs_tokens: Tensor, proprio: Tensor) -> dict[str, Tensor]:
        h = self.lift(noisy_actions) + self.position + self.body_state(proprio)[:, None]
        clock = self.clock(1000 * tau)
        for film, causal, ask, seen, think in zip(self.film, self.causal, self.ask, self.seen, self.think, strict=True):
            h = h + causal(F.layer_norm(h, h.shape[-1:]), causal=True)
            parts = (ask(h), *seen(obs_tokens).chunk(2, dim=-1))
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            h = h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
            scale, shift = film(clock)[:, None].chunk(2, dim=-1)
            h = h + think(F.gelu((1 + scale) * F.layer_norm(h, h.shape[-1:]) + shift))
        return {"velocity": self.lower(h)}
