"""Denoisers with the calls of well-known repositories, at tiny size: what each is called with, and does in its forward.

`published_style.py` has DiT, SiT and a policy's head. Here are the structures, written anew, of a SiT that also returns
projections of a middle block (REPA), of a UNet with normalised weights around which the noise level scales input and
output (EDM2), of the two streams and positions as an argument (flux), of speech with a text that may be dropped
(F5-TTS), of a policy's UNet over time steps (diffusion_policy), and of a model behind `apply_model` (sd3-ref).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.published_style import NoiseClock, PublishedSiT, SelfMix, rotate, sinusoids

W = 16


class ProjectingSiT(PublishedSiT):
    """Velocity, and for the training's alignment a list of projections of a block's tokens."""

    def __init__(self) -> None:
        super().__init__(W)
        self.projectors = nn.ModuleList(nn.Sequential(nn.Linear(W, W), nn.SiLU(), nn.Linear(W, z)) for z in (6, 3))

    def forward(self, x: Tensor, t: Tensor, y: Tensor, return_logvar: bool = False) -> tuple[Tensor, list[Tensor]]:  # type: ignore[override]
        tokens = self.stem(F.pixel_unshuffle(x, 2).flatten(2).mT)
        n, length, width = tokens.shape
        zs = [project(tokens.reshape(-1, width)).reshape(n, length, -1) for project in self.projectors]
        return super().forward(x, t, y), zs


class NormedConv(nn.Module):
    """A weight of unit rows, which a training forward also writes back."""

    def __init__(self, a: int, b: int, *kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(b, a, *kernel))

    def forward(self, x: Tensor, gain: float | Tensor = 1) -> Tensor:
        w = self.weight.to(torch.float32)
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(w))
        w = (unit(w) * (gain / math.sqrt(w[0].numel()))).to(x.dtype)
        return x @ w.t() if w.ndim == 2 else F.conv2d(x, w, padding=(w.shape[-1] // 2,))


def unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=[*range(1, x.ndim)], keepdim=True, dtype=torch.float32)
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def mixed(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


class Preconditioned(nn.Module):
    """``c_skip x + c_out F(c_in x, ln σ / 4)`` around two blocks, one of half the size; σ is one number a call."""

    freqs: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * torch.pi * torch.randn(W))
        self.register_buffer("phases", 2 * torch.pi * torch.rand(W))
        self.noise, self.label = NormedConv(W, W), NormedConv(5, W)
        self.first, self.gains = NormedConv(5, W, 3, 3), nn.ParameterList(torch.ones(()) for _ in range(2))
        self.embeds = nn.ModuleList(NormedConv(W, W) for _ in range(2))
        self.convs = nn.ModuleList(NormedConv(W, W, 3, 3) for _ in range(2))
        self.out, self.out_gain, self.spread = NormedConv(W, 4, 3, 3), nn.Parameter(torch.ones(())), NormedConv(W, 1)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Tensor | None = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
    ) -> Any:
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        dtype = torch.float32 if force_fp32 else torch.bfloat16
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
        c_noise = sigma.flatten().log() / 4
        h = (x / (0.25 + sigma**2).sqrt()).to(dtype)
        emb = self.noise((c_noise.ger(self.freqs) + self.phases).cos() * math.sqrt(2))
        if class_labels is not None:
            emb = mixed(emb, self.label(class_labels * math.sqrt(5)))
        emb = (F.silu(emb) / 0.596).to(dtype)
        h = self.first(torch.cat([h, torch.ones_like(h[:, :1])], dim=1))
        skip = h
        for gain, embed, conv, half in zip(self.gains, self.embeds, self.convs, (True, False), strict=True):
            y = F.avg_pool2d(h, 2) if half else F.interpolate(h, scale_factor=2)
            c = embed(emb, gain=gain) + 1
            h = mixed(y, conv(F.silu(y * c[:, :, None, None].to(y.dtype)) / 0.596), 0.3).clip(-256, 256)
        d = c_skip * x + c_out * self.out(mixed(h, skip), gain=self.out_gain).to(torch.float32)
        return (d, self.spread(F.silu(emb).float())) if return_logvar else d


class Positions(nn.Module):
    """Rotary tables in float64 for each axis of the ids that the caller gives."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = [
            ids[..., i].double()[..., None] / 10000 ** (torch.arange(0, n, 2).double() / n)
            for i, n in enumerate((4, 2, 2))
        ]
        table = torch.cat(angles, dim=-1)[:, None]
        return table.cos().float(), table.sin().float()


class TwoStreams(nn.Module):
    """Image and text in two streams and then one; text first; guidance of its own clock; ids beside the tensors."""

    def __init__(self, guided: bool = True) -> None:
        super().__init__()
        self.guided, self.pe = guided, Positions()
        self.img_in, self.txt_in, self.vector_in = nn.Linear(4, W), nn.Linear(6, W), nn.Linear(5, W)
        self.time_in, self.guidance_in = NoiseClock(W), NoiseClock(W)
        self.img_mod, self.txt_mod, self.one_mod = (nn.Linear(W, k * W) for k in (6, 6, 3))
        self.img_qkv, self.txt_qkv, self.one_in = nn.Linear(W, 3 * W), nn.Linear(W, 3 * W), nn.Linear(W, 7 * W)
        self.img_mlp, self.txt_mlp, self.one_out = nn.Linear(W, W), nn.Linear(W, W), nn.Linear(5 * W, W)
        self.last_mod, self.last = nn.Linear(W, 2 * W), nn.Linear(W, 4)

    def attend(self, qkv: Tensor, pe: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        q, k = (rotate(F.rms_norm(part, part.shape[-1:]), *pe) for part in (q, k))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        if img.ndim != 3 or txt.ndim != 3:
            raise ValueError("Input img and txt tensors must have 3 dimensions.")
        img, txt, vec = self.img_in(img), self.txt_in(txt), self.time_in(1000 * timesteps)
        if self.guided:
            if guidance is None:
                raise ValueError("Didn't get guidance strength for guidance distilled model.")
            vec = vec + self.guidance_in(1000 * guidance)
        vec = F.silu(vec + self.vector_in(y))
        pe = self.pe(torch.cat((txt_ids, img_ids), dim=1))
        a, b, g, d, e, f = self.img_mod(vec)[:, None].chunk(6, -1)
        p, q, r, s, t, u = self.txt_mod(vec)[:, None].chunk(6, -1)
        both = torch.cat(
            [self.txt_qkv(F.layer_norm(txt, (W,)) * (1 + q) + p), self.img_qkv(F.layer_norm(img, (W,)) * (1 + b) + a)],
            1,
        )
        heard = self.attend(both, pe)
        txt, img = txt + r * heard[:, : txt.shape[1]], img + g * heard[:, txt.shape[1] :]
        txt = txt + u * self.txt_mlp(F.layer_norm(txt, (W,)) * (1 + t) + s)
        x = torch.cat([txt, img + f * self.img_mlp(F.layer_norm(img, (W,)) * (1 + e) + d)], 1)
        shift, scale, gate = self.one_mod(vec)[:, None].chunk(3, -1)
        qkv, mlp = torch.split(self.one_in(F.layer_norm(x, (W,)) * (1 + scale) + shift), [3 * W, 4 * W], dim=-1)
        x = x + gate * self.one_out(torch.cat([self.attend(qkv, pe), F.gelu(mlp, approximate="tanh")], 2))
        shift, scale = self.last_mod(vec)[:, None].chunk(2, dim=-1)
        return self.last((1 + scale) * F.layer_norm(x[:, txt.shape[1] :, ...], (W,)) + shift)


class Speech(nn.Module):
    """Mel frames, a reference, and characters that flags may drop; the time may be one number for the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.book = NoiseClock(W), nn.Embedding(12, 6)
        self.text = nn.Conv1d(6, 6, 3, padding=1, groups=6)
        self.join, self.mix = nn.Linear(4 + 4 + 6, W), SelfMix(W, 2)
        self.mod, self.out = nn.Linear(W, 3 * W), nn.Linear(W, 4)

    def forward(
        self,
        x: Tensor,
        cond: Tensor,
        text: Tensor,
        time: Tensor,
        drop_audio_cond: bool = False,
        drop_text: bool = False,
        mask: Tensor | None = None,
    ) -> Tensor:
        batch, length = x.shape[0], x.shape[1]
        if time.ndim == 0:
            time = time.repeat(batch)
        t = self.clock(time)
        text = F.pad((text + 1)[:, :length], (0, length - text[:, :length].shape[1]), value=0)
        if drop_text:
            text = torch.zeros_like(text)
        said = self.book(text)
        said = said + self.text(said.mT).mT
        h = self.join(torch.cat((x, torch.zeros_like(cond) if drop_audio_cond else cond, said), dim=-1))
        if mask is not None:
            h = h.masked_fill(~mask[..., None], 0.0)
        shift, scale, gate = self.mod(F.silu(t))[:, None].chunk(3, -1)
        return self.out(h + gate * self.mix(F.layer_norm(h, (W,)) * (1 + scale) + shift))


class Policy(nn.Module):
    """A UNet over a trajectory, told of time and observations by FiLM; the time may be a Python number."""

    def __init__(self) -> None:
        super().__init__()
        self.clock, self.films = (
            nn.Sequential(nn.Linear(W, W), nn.Mish(), nn.Linear(W, W)),
            nn.ModuleList(nn.Linear(W + 6, 2 * W) for _ in range(2)),
        )
        self.convs = nn.ModuleList([nn.Conv1d(5, W, 3, padding=1), nn.Conv1d(2 * W, W, 3, padding=1)])
        self.norms = nn.ModuleList(nn.GroupNorm(4, W) for _ in range(2))
        self.down, self.up, self.out = nn.Conv1d(W, W, 3, 2, 1), nn.ConvTranspose1d(W, W, 4, 2, 1), nn.Conv1d(W, 5, 1)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        local_cond: Tensor | None = None,
        global_cond: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        sample = sample.mT
        timesteps: Any = timestep
        if not torch.is_tensor(timesteps):
            timesteps = torch.tensor([timesteps], dtype=torch.long, device=sample.device)
        elif torch.is_tensor(timesteps) and len(timesteps.shape) == 0:
            timesteps = timesteps[None].to(sample.device)
        told = self.clock(sinusoids(timesteps.expand(sample.shape[0]), W))
        if global_cond is not None:
            told = torch.cat([told, global_cond], dim=-1)
        h = sample
        kept: list[Tensor] = []
        for i, (film, conv, norm) in enumerate(zip(self.films, self.convs, self.norms, strict=True)):
            h = h if i == 0 else torch.cat((self.up(h), kept.pop()), dim=1)
            scale, bias = film(F.mish(told)).reshape(-1, 2, W, 1).unbind(1)
            h = scale * F.mish(norm(conv(h))) + bias
            if i == 0:
                kept.append(h)
                h = self.down(h)
        return self.out(h).mT


class Behind(nn.Module):
    """The method that its loop calls divides by σ's schedule, and casts for the network behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.diffusion_model, self.shift = TwoStreams(guided=False), 3.0

    def apply_model(
        self, x: Tensor, sigma: Tensor, c_crossattn: Tensor | None = None, y: Tensor | None = None
    ) -> Tensor:
        dtype = next(self.diffusion_model.parameters()).dtype
        n, h, w = len(x), x.shape[2] // 2, x.shape[3] // 2
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)[None].repeat(n, 1, 1)
        assert c_crossattn is not None and y is not None
        words = torch.zeros(n, c_crossattn.shape[1], 3)
        tokens = F.pixel_unshuffle(x, 2).flatten(2).mT.to(dtype)
        out = self.diffusion_model(
            tokens, ids, c_crossattn.to(dtype), words, timesteps=sigma * 1.0, y=y.to(dtype)
        ).float()
        out = F.pixel_shuffle(out.mT.unflatten(2, (h, w)), 2)
        return x - out * sigma.view(sigma.shape[:1] + (1,) * (out.ndim - 1))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.apply_model(*args, **kwargs)
