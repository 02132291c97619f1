"""FusionOpt (Taikakim/fusion-optimiser, 3e58fe7 and dbb5246) in its own equations, which are not those of the papers it
names: the twin of `fusionopt_compat`.

    a = sum|g| / n over all parameters;  G = a at the first step, else beta_p G + (1 - beta_p) a;  L likewise (loss)
    rho = clamp(L / (G + 1e-12), gamma_min, gamma_max), 1 without a loss
    autoscale, on entries 0, 16, 32, ... of every parameter, f = d^2 / d0:
        N = b3 N + sum f <g, p0 - p>;  s = b3 s + f g;  D = sum|s|;  dhat = N / D
        d = max(d, dhat) if d = d0;  d_max = max(d_max, dhat);  d = min(d_max, growth d);  A = d / d0  (D = 0: none)
    gamma = lr rho A warm decay gamma_scale;  warm = (k + 1) / warmup below warmup, k from 0

    matrices: L = bk L + (1 - bk) g g^T, R likewise; when k mod period = 0  P = (sym + delta I)^(-1/4)
              A = bn A + g - g_prev;  m = mu m + g + alpha A   (without MONA  m = mu m + g)
              U = sqrt(max(1, r/c)) NS5(P_L m P_R);  v = br v + (1 - br) sum_j U_ij^2;  U /= sqrt(max(v, 1e-12))
              U *= min(1, ||M_i|| / sqrt(V_i)), M and V averages of g and of sum_j g_ij^2, both over 1 - beta^t
    others:   U = Adam
    cautious: U = U mask ||U|| / (||U mask|| + 1e-8), mask = U g > 0, by parameter;  layer weight on matrices
    sf:       z = (1 - gamma wd) z - gamma U;  x = (1 - 1/t) x + z / t;  p = (1 - beta) z + beta x
    hyperball (matrices):  W = p - gamma R U / (||U|| + 1e-12);  p = R W / (||W|| + 1e-12);  plain where R = 0
    else:     p = (1 - gamma wd) p - gamma U

The hot dtype is fp64 here. Blocks of rows (`split`) are orthogonalized each for itself, with its own sqrt(max(1, r/c)).
"""

import math
import re
from collections.abc import Collection, Mapping

import numpy as np

from tests.oracles.newton_schulz import JORDAN, newton_schulz
from tests.oracles.protocol import Array, Given, Tensors, float64_copies

ALL = frozenset({"mona", "shampoo", "ns5", "normuon", "sf", "cautious", "snr", "autoscale"})
TABLE = JORDAN._replace(eps=1e-12, eps_rule="add")


class FusionOpt:
    """FusionOpt on all parameters; the names in `spectral` take the path of matrices."""

    def __init__(
        self,
        params: Given,
        *,
        spectral: Collection[str],
        components: Collection[str] | None = None,
        lr: float = 3e-4,
        scalar_lr: float | None = None,
        beta: float = 0.9,
        beta_p: float = 0.98,
        gamma_min: float = 0.1,
        gamma_max: float = 10.0,
        gamma_scale: float = 1.0,
        mu: float = 0.95,
        mona_alpha: float = 0.2,
        beta_n: float = 0.9,
        beta_k: float = 0.99,
        eigen_period: int = 100,
        shampoo_delta: float = 1e-4,
        beta_r: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        scalar_weight_decay: float = 0.0,
        warmup_steps: int = 0,
        decay_schedule: str | None = None,
        total_steps: int = 0,
        decay_min: float = 0.0,
        decay_start_frac: float = 0.8,
        snr_mode: str = "row",
        snr_source: str = "grad",
        snr_beta: float = 0.9,
        snr_floor: float = 0.0,
        snr_power: float = 1.0,
        autoscale_growth_rate: float = math.inf,
        layer_update_weights: Mapping[int, float] | None = None,
        hyperball: bool = False,
        split: Mapping[str, int] | None = None,
    ) -> None:
        self.components = ALL if components is None else frozenset(components)
        self.spectral, self.lr, self.scalar_lr = tuple(spectral), lr, scalar_lr
        self.beta, self.beta_p, self.clamp, self.gamma_scale = beta, beta_p, (gamma_min, gamma_max), gamma_scale
        self.mu, self.mona_alpha, self.beta_n, self.beta_r = mu, mona_alpha, beta_n, beta_r
        self.beta_k, self.eigen_period, self.shampoo_delta = beta_k, eigen_period, shampoo_delta
        self.betas, self.eps = betas, eps
        self.weight_decay, self.scalar_weight_decay = weight_decay, scalar_weight_decay
        self.warmup_steps, self.decay_schedule, self.total_steps = warmup_steps, decay_schedule, total_steps
        self.decay_min, self.decay_start_frac = decay_min, decay_start_frac
        self.snr_mode, self.snr_source, self.snr_beta = snr_mode, snr_source, snr_beta
        self.snr_floor, self.snr_power = snr_floor, snr_power
        self.growth, self.layer_weights = autoscale_growth_rate, dict(layer_update_weights or {})
        self.hyperball, self.split = hyperball, dict(split or {})

        self.p, self.x, self.z = float64_copies(params), float64_copies(params), float64_copies(params)
        self.k = 0
        self.gnorm_ema = self.loss_ema = 0.0
        self.ratio = self.multiplier = self.gamma = 1.0
        self.d0 = self.d = self.d_max = 1e-6
        self.numerator = 0.0
        self.p0 = {n: p.ravel()[::16].copy() for n, p in self.p.items()}
        self.s = {n: np.zeros_like(p) for n, p in self.p0.items()}
        self.m = {n: np.zeros_like(p) for n, p in self.p.items()}
        self.v = {n: np.zeros_like(p) for n, p in self.p.items()}
        matrices = {n: self.p[n] for n in self.spectral}
        self.curvature = {n: np.zeros_like(p) for n, p in matrices.items()}
        self.g_prev = {n: np.zeros_like(p) for n, p in matrices.items()}
        self.left = {n: np.zeros((p.shape[0], p.shape[0])) for n, p in matrices.items()}
        self.right = {n: np.zeros((p.shape[1], p.shape[1])) for n, p in matrices.items()}
        self.roots = {n: (np.eye(p.shape[0]), np.eye(p.shape[1])) for n, p in matrices.items()}
        self.rows = {n: np.zeros((p.shape[0], 1)) for n, p in matrices.items()}
        self.snr_m = {n: np.zeros_like(p) for n, p in matrices.items()}
        self.snr_v = {n: np.zeros_like(p if snr_mode == "elem" else p[:, :1]) for n, p in matrices.items()}
        self.radius = {n: float(np.linalg.norm(p)) for n, p in matrices.items()}

    def gradient_point(self) -> Tensors:
        return float64_copies(self.p)

    def weights(self) -> Tensors:
        return float64_copies(self.x if "sf" in self.components else self.p)

    def step(self, grads: Given, loss: float | None = None) -> None:
        g = float64_copies(grads)
        self.ratio = self._polyak(g, loss)
        if "autoscale" in self.components:
            self.multiplier = self._autoscale(g)
        factor = self.ratio * self.multiplier * self._warm() * self._decay() * self.gamma_scale
        self.gamma = self.lr * factor
        for name, p in self.p.items():
            matrix = name in self.spectral
            u = self._spectral(name, g[name]) if matrix else self._adam(name, g[name])
            if "cautious" in self.components:
                masked = u * (u * g[name] > 0)
                u = masked * (np.linalg.norm(u) / (np.linalg.norm(masked) + 1e-8))
            if matrix:
                u = u * self._layer_weight(name)
            rate = self.gamma if matrix or self.scalar_lr is None else self.scalar_lr * factor
            self._move(name, p, u, rate, self.weight_decay if matrix else self.scalar_weight_decay)
        self.k += 1

    def _polyak(self, g: Tensors, loss: float | None) -> float:
        a = sum(float(np.abs(t).sum()) for t in g.values()) / sum(t.size for t in g.values())
        self.gnorm_ema = a if self.k == 0 else self.beta_p * self.gnorm_ema + (1 - self.beta_p) * a
        if loss is None:
            return float(np.clip(1.0, *self.clamp))
        self.loss_ema = loss if self.k == 0 else self.beta_p * self.loss_ema + (1 - self.beta_p) * loss
        return float(np.clip(self.loss_ema / (self.gnorm_ema + 1e-12), *self.clamp))

    def _autoscale(self, g: Tensors) -> float:
        b3, f = math.sqrt(0.999), self.d**2 / self.d0
        inner = denominator = 0.0
        for name, p in self.p.items():
            sample = g[name].ravel()[::16]
            inner += f * float(sample @ (self.p0[name] - p.ravel()[::16]))
            self.s[name] = b3 * self.s[name] + f * sample
            denominator += float(np.abs(self.s[name]).sum())
        if denominator > 0:
            self.numerator = b3 * self.numerator + inner
            estimate = self.numerator / denominator
            if self.d == self.d0:
                self.d = max(self.d, estimate)
            self.d_max = max(self.d_max, estimate)
            self.d = min(self.d_max, self.d * self.growth)
        return self.d / self.d0

    def _warm(self) -> float:
        return (self.k + 1) / self.warmup_steps if self.k < self.warmup_steps else 1.0

    def _decay(self) -> float:
        if self.decay_schedule is None or self.k < self.warmup_steps:
            return 1.0
        done = min(1.0, (self.k - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        if self.decay_schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * done))
        elif self.decay_schedule == "linear":
            left = 1 - done
        else:
            of_all = min(1.0, self.k / self.total_steps)
            left = min(1.0, 1 - (of_all - self.decay_start_frac) / (1 - self.decay_start_frac))
        return self.decay_min + (1 - self.decay_min) * left

    def _spectral(self, name: str, g: Array) -> Array:
        u = g
        if "shampoo" in self.components:
            self.left[name] = self.beta_k * self.left[name] + (1 - self.beta_k) * (g @ g.T)
            self.right[name] = self.beta_k * self.right[name] + (1 - self.beta_k) * (g.T @ g)
            if self.k % self.eigen_period == 0:
                self.roots[name] = (self._root(self.left[name]), self._root(self.right[name]))
        if "mona" in self.components:
            self.curvature[name] = self.beta_n * self.curvature[name] + g - self.g_prev[name]
            self.g_prev[name] = g
            u = g + self.mona_alpha * self.curvature[name]
        self.m[name] = self.mu * self.m[name] + u
        u = self.m[name]
        if "shampoo" in self.components:
            u = self.roots[name][0] @ u @ self.roots[name][1]
        if "ns5" in self.components:
            blocks = np.split(u, self.split.get(name, 1))
            u = np.concatenate([math.sqrt(max(1.0, b.shape[0] / b.shape[1])) * newton_schulz(b, TABLE) for b in blocks])
        if "normuon" in self.components:
            squares = np.sum(u**2, axis=1, keepdims=True)
            self.rows[name] = self.beta_r * self.rows[name] + (1 - self.beta_r) * squares
            u = u / np.sqrt(np.maximum(self.rows[name], 1e-12))
        return u * self._gate(name, g if self.snr_source == "grad" else u) if "snr" in self.components else u

    def _root(self, m: Array) -> Array:
        values, vectors = np.linalg.eigh(0.5 * (m + m.T) + self.shampoo_delta * np.eye(len(m)))
        root: Array = (vectors * np.maximum(values, 1e-12) ** -0.25) @ vectors.T
        return root

    def _gate(self, name: str, of: Array) -> Array:
        row, b = self.snr_mode == "row", self.snr_beta
        square = np.sum(of**2, axis=1, keepdims=True) if row else of**2
        self.snr_m[name] = b * self.snr_m[name] + (1 - b) * of
        self.snr_v[name] = b * self.snr_v[name] + (1 - b) * square
        mean, variance = (t / (1 - b ** (self.k + 1)) for t in (self.snr_m[name], self.snr_v[name]))
        size = np.linalg.norm(mean, axis=1, keepdims=True) if row else np.abs(mean)
        gate = np.minimum(size / np.sqrt(np.maximum(variance, 1e-30)), 1.0) ** self.snr_power
        return np.maximum(gate, self.snr_floor)

    def _adam(self, name: str, g: Array) -> Array:
        (b1, b2), t = self.betas, self.k + 1
        self.m[name] = b1 * self.m[name] + (1 - b1) * g
        self.v[name] = b2 * self.v[name] + (1 - b2) * g**2
        u: Array = (self.m[name] / (1 - b1**t)) / (np.sqrt(self.v[name] / (1 - b2**t)) + self.eps)
        return u

    def _layer_weight(self, name: str) -> float:
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        return self.layer_weights.get(int(layer[1]), 1.0) if layer else 1.0

    def _move(self, name: str, p: Array, u: Array, rate: float, decay: float) -> None:
        if "sf" in self.components:
            t = self.k + 1
            self.z[name] = (1 - rate * decay) * self.z[name] - rate * u
            self.x[name] = (1 - 1 / t) * self.x[name] + self.z[name] / t
            p[...] = (1 - self.beta) * self.z[name] + self.beta * self.x[name]
        elif self.hyperball and name in self.spectral and self.radius[name] > 1e-12:
            moved = p - rate * self.radius[name] * u / (np.linalg.norm(u) + 1e-12)
            p[...] = self.radius[name] * moved / (np.linalg.norm(moved) + 1e-12)
        else:
            p[...] = (1 - rate * decay) * p - rate * u
