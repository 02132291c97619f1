"""`fusionopt_compat` in banks as a step lays them out, beside its twin, on a small problem and on FusionOpt's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion_compile._types import Tensors
from fusion_compile.optim import Context, Transform
from fusion_compile.optim._transform import BankInfo, Blocks, Place
from fusion_compile.optim.fusionopt_compat import COMPONENTS, fusionopt_compat
from tests.data.bowl import SHAPES, SPECTRAL, Bowl, noise, start_of
from tests.oracles.fusionopt import FusionOpt
from tests.oracles.protocol import Tensors as Arrays
from tests.oracles.protocol import float64_copies


class Banks:
    """Named tensors <-> banks: matrices of one shape stacked, all others in one flat bank at multiples of four."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], spectral: tuple[str, ...], split: Any = None) -> None:
        self.shapes, self.spectral = shapes, spectral
        members: dict[str, list[Place]] = {}
        self.length = 0
        for name, shape in shapes.items():
            key = f"spectral/{shape[0]}x{shape[1]}" if name in spectral else "scalar/flat"
            at = len(members.get(key, [])) if name in spectral else self.length
            members.setdefault(key, []).append(Place(name, shape, at))
            if name not in spectral:
                self.length += -(-math.prod(shape) // 4) * 4
        blocks = {k: Blocks((m[0].shape[0] // split,) * split) for k, m in members.items() if split and "spec" in k}
        self.infos = {k: BankInfo(tuple(m), blocks.get(k)) for k, m in members.items()}

    def join(self, named: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
        tensors = {n: torch.as_tensor(t).to(dtype).clone() for n, t in named.items()}
        out: Tensors = {}
        for key, info in self.infos.items():
            if key.startswith("spectral/"):
                out[key] = torch.stack([tensors[m.name] for m in info.places])
            else:
                out[key] = torch.zeros(self.length, dtype=dtype)
                for m in info.places:
                    out[key][m.at : m.at + math.prod(m.shape)] = tensors[m.name].flatten()
        return out

    def names(self, banks: Tensors) -> Tensors:
        out: Tensors = {}
        for key, info in self.infos.items():
            for m in info.places:
                flat = banks[key][m.at : m.at + math.prod(m.shape)]
                out[m.name] = banks[key][m.at] if key.startswith("spectral/") else flat.view(m.shape)
        return {name: out[name] for name in self.shapes}


class Run:
    """The transform by init and update alone; the parameters in banks, gradients by name."""

    def __init__(
        self, transform: Transform, banks: Banks, start: Mapping[str, Any], dtype: torch.dtype = torch.float64
    ) -> None:
        assert transform.bind is not None
        self.transform, self.banks, self.dtype = transform.bind(banks.infos), banks, dtype
        self.params = banks.join(start, dtype)
        self.state = self.transform.init(self.params)
        self.numbers = {k: torch.tensor(v, dtype=dtype) for k, v in self.transform.hyperparameters.items()}
        self.taken = 0

    def point(self) -> Tensors:
        move = self.transform.gradient_point
        banks = self.params if move is None else move(self.params, self.state, Context(self.numbers))
        return self.banks.names(banks)

    def weights(self) -> Tensors:
        return self.banks.names(self.params)

    def step(self, grads: Mapping[str, Any], loss: Tensor | float | None = None) -> None:
        period = self.transform.period
        due = period > 0 and self.taken % period == 0
        given = None if loss is None else torch.as_tensor(loss, dtype=self.dtype)
        context = Context(self.numbers, given, due)
        g = self.banks.join(grads, self.dtype)
        updates, self.state = self.transform.update(g, self.state, self.params, context)
        self.params = {k: p + updates[k] for k, p in self.params.items()}
        self.taken += 1

    def tells(self) -> dict[str, float]:
        assert self.transform.diagnostics is not None
        return {name: float(value) for name, value in self.transform.diagnostics(self.state).items()}


BOWL = Banks(SHAPES, SPECTRAL)


# Small enough for 40 steps of float64 with every option; two matrices share a bank, and layers 0 and 2 have a number.
SMALL: dict[str, tuple[int, ...]] = {
    "tall": (24, 16),
    "layers.0.wide": (12, 20),
    "layers.2.wide": (12, 20),
    "square": (16, 16),
    "table": (9, 5),
    "gain": (33,),
    "bias": (70,),
}


SMALL_SPECTRAL = ("tall", "layers.0.wide", "layers.2.wide", "square")


class SmallBowl:
    """Loss and gradient of sum(h (p - t)² / 2 + n p) in float64, by name; n is new at every step."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SMALL) -> None:
        draw = np.random.default_rng(3)
        self.shapes = shapes
        self.start = {n: 0.3 * draw.standard_normal(s) for n, s in shapes.items()}
        self.minimum = {n: 0.3 * draw.standard_normal(s) for n, s in shapes.items()}
        self.curvature = {n: np.exp(draw.uniform(-3, 1, s)) for n, s in shapes.items()}

    def __call__(self, point: Mapping[str, Any], step: int) -> tuple[float, Arrays]:
        draw = np.random.default_rng([4, step])
        p = float64_copies(point)
        loss, grads = 0.0, {}
        for n, shape in self.shapes.items():
            noise, away = 0.1 * draw.standard_normal(shape), p[n] - self.minimum[n]
            loss += float(np.sum(0.5 * self.curvature[n] * away**2 + noise * p[n]))
            grads[n] = self.curvature[n] * away + noise
        return loss, grads


OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {"components": ()},
    **{part: {"components": (part,)} for part in COMPONENTS},
    "everything": {},
    "full fusion": {"components": ("ns5", "normuon", "sf", "mona", "shampoo"), "eigen_period": 7},
    "hyperball": {"components": ("ns5", "normuon", "cautious"), "hyperball": True},
    "snr elem": {"components": ("ns5", "snr"), "snr_mode": "elem", "snr_floor": 0.3, "snr_power": 1.5},
    "snr of the update": {"components": ("ns5", "normuon", "snr", "sf"), "snr_source": "update"},
    "snr elem of the update": {"components": ("ns5", "snr"), "snr_mode": "elem", "snr_source": "update"},
    "cosine": {"decay_schedule": "cosine", "total_steps": 36, "warmup_steps": 5, "components": ("ns5", "sf")},
    "linear": {"decay_schedule": "linear", "total_steps": 36, "decay_min": 0.2, "components": ("ns5",)},
    "wsd": {"decay_schedule": "wsd", "total_steps": 36, "warmup_steps": 9, "components": ("ns5", "normuon")},
    "wsd begun in the warm-up": {
        "decay_schedule": "wsd",
        "total_steps": 30,
        "warmup_steps": 9,
        "decay_start_frac": 0.1,
        "components": ("ns5",),
    },
    "layer weights": {"layer_update_weights": {0: 0.25, 3: 9.0}, "components": ("ns5", "sf", "cautious")},
    "slow growth": {"autoscale_growth_rate": 1.02, "components": ("autoscale", "sf"), "lr": 1e-5},
    "other numbers": {
        "components": ("ns5", "normuon", "sf", "mona", "shampoo", "snr", "cautious"),
        "lr": 2e-3,
        "scalar_lr": 5e-4,
        "beta": 0.8,
        "beta_p": 0.9,
        "gamma_min": 0.5,
        "gamma_max": 300.0,
        "gamma_scale": 0.7,
        "mu": 0.9,
        "mona_alpha": -0.3,
        "beta_n": 0.8,
        "beta_k": 0.9,
        "eigen_period": 5,
        "shampoo_delta": 1e-2,
        "beta_r": 0.9,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "scalar_weight_decay": 0.05,
        "snr_beta": 0.8,
    },
}


def distance(found: Mapping[str, Any], wanted: Arrays, start: Arrays, rounding: float = 0.0) -> float:
    """The largest ``(‖found - wanted‖ - rounding ‖wanted‖) / ‖wanted - start‖`` of any parameter."""
    at, norm = float64_copies(found), np.linalg.norm
    return max(float((norm(at[n] - w) - rounding * norm(w)) / norm(w - start[n])) for n, w in wanted.items())


def follow(
    options: Mapping[str, Any], dtype: torch.dtype, n_steps: int, loss: bool = True, split: int | None = None
) -> tuple[float, Run, FusionOpt]:
    """Transform and twin, each with gradients at its own point; the largest distance at x and y after each step."""
    problem = SmallBowl()
    banks = Banks(SMALL, SMALL_SPECTRAL, split)
    hot = torch.float64 if dtype == torch.float64 else "fp32"
    run = Run(fusionopt_compat(**options, hot_dtype=hot), banks, problem.start, dtype)
    blocks = dict.fromkeys(SMALL_SPECTRAL, split) if split else None
    twin = FusionOpt(problem.start, spectral=SMALL_SPECTRAL, split=blocks, **options)
    worst = 0.0
    for step in range(n_steps):
        for follower, take in ((run.point(), run.step), (twin.gradient_point(), twin.step)):
            value, grads = problem(follower, step)
            take(grads, value if loss else None)
        tells = run.tells()
        assert tells["fusion/gamma_curr"] == pytest.approx(twin.ratio, rel=1e-9 if dtype == torch.float64 else 1e-5)
        for found, wanted in ((run.weights(), twin.weights()), (run.point(), twin.gradient_point())):
            # fp32 weights are rounded at every step, whatever the displacement: 5 times 6e-8
            worst = max(worst, distance(found, wanted, problem.start, 0.0 if dtype == torch.float64 else 3e-7))
    return worst, run, twin


def on_bowl(run: Run, update: int, scale: float = 1.0) -> float:
    """One update on the Bowl with the noise of FusionOpt's runs; the loss at the gradient point, handed over."""
    weights = {n: p.detach().requires_grad_() for n, p in run.point().items()}
    loss: Tensor = torch.func.functional_call(Bowl(scale=scale), weights, noise(update))
    run.step(dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True)), loss.detach())
    return float(loss.detach())


def bowl_run(components: tuple[str, ...] | None, **options: Any) -> Run:
    return Run(fusionopt_compat(components, 1e-3, **options), BOWL, start_of(Bowl()), torch.float32)


def small_run(dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    transform = fusionopt_compat(eigen_period=2, **options)
    return Run(transform, Banks(SMALL, SMALL_SPECTRAL), SmallBowl().start, dtype)
