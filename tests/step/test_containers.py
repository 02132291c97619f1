"""Containers of a batch: the loss gets an object of the class that it gets in the ordinary loop, with live tensors."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step.containers import children, map_tensors, special_containers
from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "captured": {"backend": "aot_eager"},
    "run": {"backend": "aot_eager", "capture": "run"},
}


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: keys are attributes, and it can be unpacked."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclasses.dataclass
class Output(OrderedDict[str, Any]):
    """As transformers' and diffusers' ModelOutput: a dictionary and a dataclass at once."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            self[field.name] = getattr(self, field.name)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))


@dataclasses.dataclass(frozen=True)
class Sample:
    """A frozen dataclass with a property, a tensor in a list, and a string."""

    x: Tensor
    rest: list[Tensor]
    split: str = "train"

    @property
    def y(self) -> Tensor:
        return self.rest[0]


class Row(NamedTuple):
    x: Any
    y: Any


def by_attribute(m: nn.Module, b: Any) -> Tensor:
    return F.mse_loss(m(b.x), b.y)


def by_key(m: nn.Module, b: Any) -> Tensor:
    return F.mse_loss(m(b["x"]), b["y"])


def unpacked(m: nn.Module, b: Any) -> Tensor:
    def call(x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(m(x), y)

    return call(**b)


class Cache:
    """An object that keeps tensors, as attention caches do."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.layers = [{"x": x}, {"y": y}]

    @property
    def x(self) -> Tensor:
        return self.layers[0]["x"]

    @property
    def y(self) -> Tensor:
        return self.layers[1]["y"]


class Slotted:
    """An object without a dictionary."""

    __slots__ = ("unset", "x", "y")

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[..., Tensor]]] = {
    "BatchEncoding": (lambda x, y: Encoding({"x": x, "y": y}), by_attribute),
    "BatchEncoding, unpacked": (lambda x, y: Encoding({"x": x, "y": y}), unpacked),
    "ModelOutput": (Output, by_attribute),
    "dataclass": (lambda x, y: Sample(x, [y]), by_attribute),
    "NamedTuple": (Row, by_attribute),
    "OrderedDict": (lambda x, y: OrderedDict(x=x, y=y), by_key),
    "defaultdict": (lambda x, y: defaultdict(list, x=x, y=y), by_key),
    "SimpleNamespace": (lambda x, y: types.SimpleNamespace(x=x, y=y), by_attribute),
    "an object": (Cache, by_attribute),
    "an object with slots": (Slotted, by_attribute),
    "nested": (lambda x, y: Row(Encoding({"x": x}), Sample(y, [y])), lambda m, b: F.mse_loss(m(b.x["x"]), b.y.y)),
}
QUICK = ("BatchEncoding", "dataclass", "an object")


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        pytest.param(kind, way, marks=() if way == "eager" or kind in QUICK else pytest.mark.exhaustive)
        for kind in KINDS
        for way in WAYS
    ],
)
def test_a_batch_in_a_container_trains_as_in_the_ordinary_loop(kind: str, way: str) -> None:
    make, loss = KINDS[kind]
    mine, reference = mlp(), mlp()
    step = compiled(mine, loss, lr=1e-2, **WAYS[way])
    losses = [step(make(*batch)) for batch in batches(4)]
    expected = torch_loop(reference, [(make(*batch),) for batch in batches(4)], loss, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference)


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_containers_are_cut_by_accumulate(way: str) -> None:
    mine, reference = mlp(), mlp()
    step = compiled(mine, by_attribute, lr=1e-2, accumulate=2, **WAYS[way])
    for x, y in batches(2):
        step(Row(x, y))
    torch_loop(reference, batches(2), lr=1e-2)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


def test_another_class_is_another_kind_of_batch() -> None:
    mine, reference = mlp(), mlp()
    step = compiled(mine, by_attribute, mode="eager", lr=1e-2)
    first, second = batches(2)
    step(Row(*first))
    step(Encoding({"x": second[0], "y": second[1]}))
    torch_loop(reference, [first, second], lr=1e-2)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


def test_containers_are_rebuilt_and_not_changed() -> None:
    x, y = torch.zeros(2), torch.ones(2)
    trees: tuple[Any, ...] = (
        Encoding({"x": x, "y": y}),
        Output(x, y),
        Sample(x, [y]),
        Row(x, y),
        defaultdict(float, x=x, y=y),
    )
    for tree in trees:
        other = map_tensors(lambda t: t + 1, tree)
        assert type(other) is type(tree)
        inner = children(other)
        assert inner is not None and float(inner[0][1][0]) == 1.0
        again = children(tree)
        assert again is not None and again[0][1] is x
    assert map_tensors(lambda t: t, defaultdict(list)).default_factory is list
    assert map_tensors(lambda t: t + 1, Output(x, y)).x is not x
    assert [path for path, _ in special_containers((Row(x, y), {"a": [Sample(x, [y])]}))] == [
        "batch[0]",
        "batch[1]['a'][0]",
    ]
    assert children(3.0) is None and children(Sample) is None


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_a_generator_in_a_closure_goes_on_from_step_to_step(way: str) -> None:
    def loss_with(generator: torch.Generator) -> Callable[..., Tensor]:
        return lambda m, x, y: F.mse_loss(m(x + torch.randn(x.shape, generator=generator)), y)

    mine, reference = mlp(), mlp()
    with pytest.warns(UserWarning, match="captured by running") if way == "captured" else contextlib.nullcontext():
        step = compiled(mine, loss_with(torch.Generator().manual_seed(5)), lr=1e-2, **WAYS[way])
        losses = [step(*batch) for batch in batches(3)]
    expected = torch_loop(reference, batches(3), loss_with(torch.Generator().manual_seed(5)), lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference)


@pytest.mark.parametrize("way", ["eager", "captured"])
def test_latents_of_inference_mode_train(way: str) -> None:
    """A cache of latents, filled under inference_mode. autograd refuses such tensors; a step takes clones."""
    with torch.inference_mode():
        cached = [(x * 2, y) for x, y in batches(3)]
    mine, reference = mlp(), mlp()
    step = compiled(mine, lr=1e-2, **WAYS[way])
    for x, y in cached:
        step({"x": x}["x"], y)
    torch_loop(reference, [(x * 2, y) for x, y in batches(3)], lr=1e-2)
    assert_same_weights(mine, reference)


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (torch.Generator(), r"batch\[2\] is a torch\.Generator, .* let the loss close over it"),
        ([2j], r"batch\[2\]\[0\] is a complex \(2j\), which a program cannot take; give tensors, numbers, None"),
        ({"a": {*range(100)}}, r"batch\[2\]\['a'\] is a set, which a program cannot take"),
        (Cache(torch.zeros(1), nn.Tanh()), r"batch\[2\]\.layers\[1\]\['y'\] is a Tanh \(Tanh\(\)\), which a program"),  # type: ignore[arg-type]
    ],
)
def test_what_a_program_cannot_take_is_named_in_one_sentence(odd: Any, words: str) -> None:
    step = compiled(mlp(), lambda m, x, y, z: F.mse_loss(m(x), y), mode="eager")
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=words) as refusal:
        step(x, y, odd)
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)


def test_what_holds_itself_is_refused_by_its_path() -> None:
    ring = types.SimpleNamespace(x=torch.zeros(1))
    ring.parent = [ring]
    step = compiled(mlp(), lambda m, x, y, z: F.mse_loss(m(x), y), mode="eager")
    with pytest.raises(ValueError, match=r"batch\[2\]\.parent\[0\] is batch\[2\] itself"):
        step(*batches(1)[0], ring)


def test_an_object_given_to_a_module_kept_in_fp32_is_not_copied() -> None:
    """Its forward may write into it."""

    class Counts(nn.Linear):
        def forward(self, x: Tensor, kept: Any = None) -> Tensor:
            kept.seen = True
            return super().forward(x)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Counts(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            kept = types.SimpleNamespace(x=x, seen=False)
            out: Tensor = self.inner(x, kept=kept)
            return out if kept.seen else out * torch.nan

    step = compiled(Around(), mode="eager", compute_dtype=torch.bfloat16, keep_fp32=["inner"])
    assert torch.isfinite(step(*batches(1)[0]))


def test_lazy_modules_and_sparse_embeddings_are_named_with_what_to_do() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet, .* call the model once"):
        fc.compile_training_step(lazy, by_key, optimizer="adamw", mode="eager")
    lazy(torch.zeros(1, 4))
    assert torch.isfinite(compiled(lazy, mode="eager")(*batches(1)[0]))
    words = nn.ModuleDict({"words": nn.Embedding(5, 4, sparse=True), "out": nn.Linear(4, 2)})

    def loss(m: nn.ModuleDict, tokens: Tensor) -> Tensor:
        out: Tensor = m["out"](m["words"](tokens)).square().mean()
        return out

    with pytest.raises(ValueError, match=r"the model's words is a Embedding with sparse=True, .*words\.sparse = "):
        compiled(words, loss, mode="eager")
    words["words"].sparse = False  # type: ignore[assignment]
    assert torch.isfinite(compiled(words, loss, mode="eager")(torch.tensor([1, 2])))


def test_anomaly_detection_around_a_step_changes_nothing() -> None:
    mine, reference = mlp(), mlp()
    step = compiled(mine, lr=1e-2, mode="eager")
    with torch.autograd.set_detect_anomaly(True):
        for batch in batches(2):
            step(*batch)
    torch_loop(reference, batches(2), lr=1e-2)
    assert_same_weights(mine, reference)
