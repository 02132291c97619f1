"""Rows: what a batch, or a condition of a denoiser, comes in."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.real_programs.program import Program, Sampling, Training
from tests.small_models import batches, mlp

Make = Callable[[Tensor, Tensor], Any]
Read = Callable[[Any], tuple[Tensor, Tensor]]


class Row(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass
class Sample:
    x: Tensor
    y: Tensor
    split: str = "train"


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    rest: list[Tensor]

    @property
    def y(self) -> Tensor:
        return self.rest[0]


class Named(dict[str, Any]):
    """Attributes for keys, as many projects have it."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Cache:
    """Keys and values of a context, as attention caches keep them; written once, before the first call."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.layers = [{"x": x}, {"y": y}]

    @property
    def x(self) -> Tensor:
        return self.layers[0]["x"]

    @property
    def y(self) -> Tensor:
        return self.layers[1]["y"]


Old = namedtuple("Old", ["x", "y"])


def _attributes(b: Any) -> tuple[Tensor, Tensor]:
    return b.x, b.y


def _keys(b: Any) -> tuple[Tensor, Tensor]:
    return b["x"], b["y"]


def _encoding(x: Tensor, y: Tensor) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"x": x, "y": y})


def _model_output(x: Tensor, y: Tensor) -> Any:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=x, hidden_states=(y,))


def _diffusers_output(x: Tensor, y: Tensor) -> Any:
    from diffusers.models.controlnets.controlnet import ControlNetOutput

    return ControlNetOutput(down_block_res_samples=(x,), mid_block_res_sample=y)


KINDS: dict[str, tuple[Make, Read]] = {
    "tuple": (lambda x, y: (x, y), lambda b: (b[0], b[1])),
    "list": (lambda x, y: [x, y], lambda b: (b[0], b[1])),
    "dict": (lambda x, y: {"x": x, "y": y}, _keys),
    "nested": (lambda x, y: {"a": [x, {"b": (y, None)}]}, lambda b: (b["a"][0], b["a"][1]["b"][0])),
    "NamedTuple": (Row, _attributes),
    "namedtuple": (Old, _attributes),
    "OrderedDict": (lambda x, y: OrderedDict(x=x, y=y), _keys),
    "defaultdict": (lambda x, y: defaultdict(list, x=x, y=y), _keys),
    "UserDict": (lambda x, y: UserDict({"x": x, "y": y}), _keys),
    "a class derived from dict": (lambda x, y: Named(x=x, y=y), _attributes),
    "dataclass": (Sample, _attributes),
    "frozen dataclass with slots and a property": (lambda x, y: Frozen(x, [y]), _attributes),
    "SimpleNamespace": (lambda x, y: types.SimpleNamespace(x=x, y=y), _attributes),
    "an object that keeps tensors": (Cache, _attributes),
    "transformers' BatchEncoding": (_encoding, _keys),
    "transformers' ModelOutput": (_model_output, lambda b: (b.last_hidden_state, b.hidden_states[0])),
    "diffusers' output": (_diffusers_output, lambda b: (b.down_block_res_samples[0], b.mid_block_res_sample)),
    "with None, a bool and a string": (lambda x, y: {"x": x, "y": y, "m": None, "k": True, "s": "v"}, _keys),
    "with a Python number": (lambda x, y: {"x": x, "y": y, "n": 3}, _keys),
    "with a numpy array": (
        lambda x, y: {"x": x, "y": y.numpy()},
        lambda b: (b["x"], torch.as_tensor(b["y"])),
    ),
}


class Conditioned(nn.Module):
    """A denoiser whose condition is in a container."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.net, self.time, self.read = mlp(), nn.Linear(1, 4), read

    def forward(self, z: Tensor, t: Tensor, cond: Any) -> Tensor:
        x, y = self.read(cond)
        return self.net(z + x + self.time(t[:, None])) + y.square()


def _rows(make: Make, read: Read) -> Program:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        x, y = read(batch)
        return F.mse_loss(model(x), y)

    def train() -> Training:
        return Training(mlp(), loss_fn, [(make(x, y),) for x, y in batches(3)])

    def sample() -> Sampling:
        model = Conditioned(read).eval().requires_grad_(False)
        calls = []
        for x, y in batches(2):
            held = make(x, y)  # the same object at each step, as a loop passes it
            calls += [{"z": torch.randn(8, 4), "t": torch.full((8,), t), "cond": held} for t in (0.9, 0.5, 0.1)]
        return Sampling(model, calls)

    return Program(train, sample)


PROGRAMS: dict[str, Program] = {name: _rows(*kind) for name, kind in KINDS.items()}
