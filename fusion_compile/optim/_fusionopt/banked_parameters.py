"""FusionOpt's computations for each parameter, on banks that hold many: totals, sampled entries, layer weights.

Stacked banks have a leading dimension for parameters. The boundaries in a flat bank come from `bind`; without it a bank
is one parameter. The number of operations does not grow with the number of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fusion_compile._compat import mark_static
from fusion_compile._types import Tensors
from fusion_compile.optim._parameter_sums import ParameterSums
from fusion_compile.optim._transform import SPECTRAL, BankInfos

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def is_stacked(key: str) -> bool:
    """Whether the bank of this key holds matrices ``[..., m, n]``."""
    return key.split("/", 1)[0] == SPECTRAL


class BankedParameters:
    """The parameters of the banks that `infos` describe; None: one parameter a flat bank, and nameless matrices."""

    def __init__(self, infos: BankInfos | None, layer_weights: Mapping[int, float] | None) -> None:
        self._infos: BankInfos = {} if infos is None else infos
        self._layer_weights = layer_weights or {}
        self._made: Tensors = {}
        self._sums = {k: ParameterSums(info.places) for k, info in self._infos.items() if not is_stacked(k)}

    def make_tables(self, banks: Tensors) -> None:
        """Put the index tensors for `banks` on their device, once. Without this call they are made on use, which on a
        GPU is a copy from the CPU at every uncompiled step."""
        for key, bank in banks.items():
            if key in self._sums:
                self._sums[key].prepare(bank)
            if type(bank) in (Tensor, torch.nn.Parameter):  # not the fake tensors of a trace
                for name, values in self._tables(key, bank).items():
                    at = f"{key}:{name}:{bank.device}"
                    if at not in self._made:
                        self._made[at] = _tensor(values, bank.device)
                        mark_static(self._made[at])  # a CUDA graph reads it in place

    def count(self, key: str, bank: Tensor) -> int:
        """Entries of `bank` that belong to a parameter; the others pad a flat bank."""
        info = self._infos.get(key)
        return bank.numel() if info is None else sum(place.numel for place in info.places)

    def totals(self, key: str, x: Tensor) -> Tensor:
        """The sum of x over each parameter: ``[..., 1, 1]`` for matrices, one number each for those of a flat bank."""
        if is_stacked(key):
            return x.sum(-1, keepdim=True).sum(-2, keepdim=True)
        if key not in self._sums:
            return (x.sum(-1) if x.ndim > 1 else x).sum()
        return self._sums[key].sums(x)

    def scaled(self, key: str, x: Tensor, factors: Tensor) -> Tensor:
        """x times one number for each parameter, in the form of `totals`."""
        return x * factors if key not in self._sums else self._sums[key].scale(x, factors)

    def sampled(self, key: str, x: Tensor, every: int) -> Tensor:
        """Entries 0, `every`, 2·`every`, … of each parameter. Matrices: these alone, ``[..., entries]``. Flat banks: x
        with zeros elsewhere, because state must have the form of the bank."""
        if is_stacked(key):
            return x.flatten(-2)[..., ::every].clone()
        at = torch.arange(x.numel(), device=x.device)
        if key in self._infos:
            at = at - self._table("starts", key, x)[self._owner(key, x)]
        return torch.where((at % every == 0).view(x.shape), x, torch.zeros_like(x))

    def layer_weight(self, key: str, x: Tensor) -> Tensor | None:
        """The multiplier of every matrix, ``[K, 1, 1]``: that of layer N if the name has ``layers.N.``, else 1. None if
        no matrix of the bank has one."""
        if "layer_weights" not in self._tables(key, x):
            return None
        return self._table("layer_weights", key, x).to(x.dtype)[:, None, None]

    def _owner(self, key: str, x: Tensor) -> Tensor:
        """The index of the parameter to which each entry of a flat bank belongs."""
        at = torch.arange(x.numel(), device=x.device)
        return torch.bucketize(at, self._table("ends", key, x), right=True)

    def _table(self, name: str, key: str, x: Tensor) -> Tensor:
        made = self._made.get(f"{key}:{name}:{x.device}")
        return _tensor(self._tables(key, x)[name], x.device) if made is None else made

    def _tables(self, key: str, bank: Tensor) -> dict[str, list[int] | list[float]]:
        info = self._infos.get(key)
        if info is None:
            return {}
        if is_stacked(key):
            weights = [self._weight_of(place.name) for place in info.places]
            return {} if all(w == 1.0 for w in weights) else {"layer_weights": weights}
        starts = [place.at for place in info.places]
        return {"starts": starts, "ends": [*starts[1:], bank.numel()]}

    def _weight_of(self, name: str) -> float:
        layer = _LAYER.search(name)
        return 1.0 if layer is None else self._layer_weights.get(int(layer[1]), 1.0)


def _tensor(values: list[int] | list[float], device: torch.device) -> Tensor:
    dtype = torch.float64 if isinstance(values[0], float) else torch.int64
    return torch.tensor(values, dtype=dtype, device=device)
