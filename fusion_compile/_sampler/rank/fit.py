"""The directions in which a denoiser's conditioning vectors move over a range of timesteps.

The pass `factor_conditioning` asks for the fit of each `Curve`. The fit evaluates the curve at timesteps all over the
range. Its mean is the mean of each row of the batch. Its basis is the principal directions of the differences from the
mean, of all rows together. The weights of the curve's layers are multiplied by both. Sums are float64 and rounded at
the end.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from fusion_compile._sampler.rank.timestep_range import TimestepRange
from fusion_compile._sampler.report import RankReport
from fusion_compile._say_once import SayOnce
from fusion_compile._types import Tensors
from fusion_compile.passes import BindingTime, Curve, Declined, Factored, FactoredLayer, Fit, factor_conditioning

N_SAMPLES = 512
"""Timesteps at which a curve is fitted: three for each turn of the fastest usual sinusoid, 1000 rad over the range."""

N_MEASURED = 32
"""Timesteps at which layers are compared: halfway between samples, the farthest from the subspace."""

_AT_ONCE = 32
"""Timesteps evaluated in one batch."""

_COLUMNS = 4096
"""Columns of a weight that are converted to float64 at a time."""


class RankConditioning:
    """A denoiser's conditioning at `rank`, for the timesteps of `covers` after a cast to the dtype of `like`.

    `like`: a timestep as the model is given it.
    """

    def __init__(self, rank: int, covers: TimestepRange, like: Tensor) -> None:
        self.covers = covers.in_dtype_of(like)
        self._rank, self._asked, self._like = rank, covers, like.detach()
        self._sampled, self._between = covers.samples(N_SAMPLES, like)
        self._measured: dict[str, float] = {}
        self._fits: set[object] = set()
        self._factored: Factored | None = None

    def factor(
        self, graph_module: fx.GraphModule, times: Mapping[str, BindingTime]
    ) -> tuple[fx.GraphModule, dict[str, BindingTime]]:
        """Return a factored copy of a denoiser's graph and the binding times of its inputs, where the timestep is live.

        `times`: of the call's inputs. Warns if nothing was factored.
        """
        graph_module = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
        covers = (self.covers.low, self.covers.high)
        self._factored = factor_conditioning(graph_module, times, rank=self._rank, covers=covers, fit=self._fit)
        if not self._factored.curves:
            why = f" {self.declined[-1].node}: {self.declined[-1].reason}" if self.declined else ""
            SayOnce()(
                "rank",
                f"Rank({self._rank}) factors no layer of this model, so everything that depends on the timestep is "
                f"computed at every step as before. Pass conditioning=Exact().{why}",
            )
        later = dict(times)
        later.update({n: BindingTime.LIVE for n, time in times.items() if time is BindingTime.STEP})
        return graph_module, later

    @property
    def declined(self) -> tuple[Declined, ...]:
        """Layers that depend on the timestep and were not factored."""
        return self._factored.report.declined if self._factored else ()

    def is_fit(self, node: fx.Node) -> bool:
        """Whether `node` of a factored graph, or of a stage of it, fits a curve: it gives all factors."""
        return node.target in self._fits

    def measure_again(self) -> None:
        """Weights changed: measure at the next fit."""
        self._measured.clear()

    def report(self) -> RankReport:
        """Return the layers, bytes and range, and the measured difference.

        `measured_difference` is the largest relative difference of a layer's output, over all layers: the norm of the
        difference divided by the norm of the exact output, where the fit is worst between its samples. The first fit of
        each curve measures it, so it is None before, and again after `measure_again`.
        """
        done = self._factored
        assert done is not None
        return RankReport(
            self._rank,
            done.report.changed,
            done.weight_bytes,
            done.factor_bytes,
            self._asked.low,
            self._asked.high,
            max(self._measured.values(), default=None),
        )

    def _fit(self, curve: Curve) -> Fit:
        def fit_conditioning(*inputs: Tensor) -> tuple[Tensor, ...]:
            known = dict(zip(curve.inputs, inputs, strict=True))
            mean, basis = principal_directions(self._points(curve, self._sampled, known), self._rank)
            mean, basis = mean.to(curve.dtype), basis.to(curve.dtype)
            layers = [_factor(layer, mean.double(), basis.double(), known) for layer in curve.layers]
            if curve.node not in self._measured:
                self._measured[curve.node] = self._measure(curve, mean, basis, layers, known)
            return (mean, basis, *(part for layer in layers for part in layer))

        self._fits.add(fit_conditioning)
        return fit_conditioning

    def _points(self, curve: Curve, timesteps: Tensor, known: Mapping[str, Tensor]) -> Tensor:
        """The curve at `timesteps` ``[n]``: float64 ``[n, rows, in]``."""
        stacked = timesteps.reshape(-1, *[1] * self._like.dim()).expand(-1, *self._like.shape)
        values = {**known, curve.step_input: stacked}
        dims = tuple(0 if name == curve.step_input else None for name in curve.source.inputs)
        run = torch.vmap(curve.source.graph_module, in_dims=dims, chunk_size=_AT_ONCE)
        points: Tensor = run(*(values[name] for name in curve.source.inputs))[0]
        return points.double().reshape(len(timesteps), *curve.shape)

    def _measure(
        self,
        curve: Curve,
        mean: Tensor,
        basis: Tensor,
        layers: list[tuple[Tensor, Tensor]],
        known: Tensors,
    ) -> float:
        points = self._points(curve, self._between, known)
        coefficients = (points - mean.double()) @ basis.double()
        distances = (points - mean.double() - coefficients @ basis.double().T).norm(dim=(1, 2)) / points.norm(
            dim=(1, 2)
        )
        worst = distances.topk(min(N_MEASURED, len(distances))).indices
        points, coefficients = points[worst], coefficients[worst]
        largest = 0.0
        for layer, (factor, offset) in zip(curve.layers, layers, strict=True):
            matrix, bias = _operands(layer, known)
            before = _product(points, matrix) + bias
            now = coefficients @ factor.double() + offset.double()
            difference, size = (now - before).norm(dim=(1, 2)), before.norm(dim=(1, 2))
            largest = max(largest, float(torch.where(difference == 0, 0.0, difference / size).max()))
        return largest


def principal_directions(points: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the mean of each row ``[rows, in]`` of float64 `points` ``[n, rows, in]`` and an orthonormal basis.

    The basis ``[in, rank]`` holds the directions in which the differences from the mean vary most. Directions beyond
    the span of the points are arbitrary.
    """
    mean = points.mean(0)
    differences = (points - mean).flatten(0, 1)
    n, width = differences.shape
    if n < width:  # the smaller of the two Gram matrices has the same spectrum
        vectors = differences.T @ torch.linalg.eigh(differences @ differences.T).eigenvectors
    else:
        vectors = torch.linalg.eigh(differences.T @ differences).eigenvectors
    leading = vectors.flip(1)[:, :rank]
    directions = torch.nn.functional.pad(leading, (0, rank - leading.shape[1]))
    return mean, torch.linalg.qr(directions).Q


def _factor(layer: FactoredLayer, mean: Tensor, basis: Tensor, known: Tensors) -> tuple[Tensor, Tensor]:
    """Factor ``[rank, out]`` and offset ``[rows, out]`` for a float64 `mean` and `basis`."""
    matrix, bias = _operands(layer, known)
    return _product(basis.T, matrix).to(layer.dtype), (_product(mean, matrix) + bias).to(layer.dtype)


def _operands(layer: FactoredLayer, known: Tensors) -> tuple[Tensor, Tensor | float]:
    """Matrix ``[in, out]`` as the layer has it, and bias in float64."""
    stage = layer.operands
    matrix, *bias = stage.graph_module(*(known[name] for name in stage.inputs))
    return matrix.T if layer.transposed else matrix, bias[0].double() if bias else 0.0


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """float64 ``[..., in] @ [in, out]``, without a float64 copy of the whole matrix."""
    return torch.cat([rows @ part.double() for part in torch.split(matrix, _COLUMNS, dim=1)], dim=-1)
