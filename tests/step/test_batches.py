"""What a batch may hold, its signature, and its split into micro-batches."""

from __future__ import annotations

import enum
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._step.batches import check_same_kind, leaves, numbers, signature
from tests.small_models import assert_same_weights, compiled, torch_loop

CPU = torch.device("cpu")


def test_leaves_have_the_path_that_a_user_would_write() -> None:
    tree = (1, {"x": [2, (3,)]})
    assert list(leaves(tree)) == [("batch[0]", 1), ("batch[1]['x'][0]", 2), ("batch[1]['x'][1][0]", 3)]


def test_a_signature_has_shape_dtype_stride_and_plain_values_but_no_data() -> None:
    one = signature((torch.zeros(2, 3), {"mask": None, "name": "a", "flag": True}), CPU)
    assert one == (
        ("batch[0]", ((2, 3), torch.float32, (3, 1), None)),
        ("batch[1]['mask']", None),
        ("batch[1]['name']", "a"),
        ("batch[1]['flag']", True),
    )
    assert signature((torch.ones(2, 3),), CPU) == signature((torch.zeros(2, 3),), CPU)
    assert signature((torch.zeros(3, 2).T,), CPU) != signature((torch.zeros(2, 3),), CPU)


def test_a_number_is_known_by_its_type_or_where_it_is_fixed_by_its_value() -> None:
    class Kind(enum.Enum):
        IMAGE = 1

    batch = (2, {"scale": 0.5, "kind": Kind.IMAGE, "size": torch.Size((4, 4))})
    assert numbers(batch) == {"batch[0]": 2, "batch[1]['scale']": 0.5}
    constants = (("batch[1]['kind']", Kind.IMAGE), ("batch[1]['size']", torch.Size((4, 4))))
    assert signature(batch, CPU) == (("batch[0]", int), ("batch[1]['scale']", float), *constants)
    assert signature(batch, CPU, fixed=True) == (("batch[0]", "2"), ("batch[1]['scale']", "0.5"), *constants)


@pytest.mark.parametrize(
    ("batch", "error", "words"),
    [
        (
            (torch.zeros(2, device="meta"),),
            ValueError,
            r"batch\[0\] \[2\] is on meta, but the model is on cpu\. Move it",
        ),
        ((torch.zeros(2, requires_grad=True),), ValueError, r"requires a gradient, .* pass tensor\.detach"),
        (({"t": 2j},), TypeError, r"batch\[0\]\['t'\] is a complex \(2j\), which a program cannot take; give tensors"),
    ],
)
def test_what_a_program_cannot_take_is_refused(batch: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        signature(batch, CPU)


def test_another_shape_or_part_is_the_same_kind_and_another_dtype_is_not() -> None:
    first = signature((torch.zeros(2, 3), None), CPU)
    check_same_kind(signature((torch.zeros(5, 3), None), CPU), [first])
    check_same_kind(first, [])
    with pytest.raises(ValueError, match=r"batch\[0\] is torch.float64, but the step was compiled for torch.float32"):
        check_same_kind(signature((torch.zeros(2, 3, dtype=torch.float64), None), CPU), [first])
    check_same_kind(signature((torch.zeros(2, 3), "another constant"), CPU), [first])
    check_same_kind(signature((torch.zeros(2, 3),), CPU), [first])
    check_same_kind(signature((torch.zeros(2, 3), None, torch.zeros(1)), CPU), [first])


@pytest.mark.parametrize("capture", ["read", "run"])
def test_one_tensor_in_two_places_and_views_of_one_are_what_they_are_in_the_ordinary_loop(capture: Any) -> None:
    """A program for each pattern: where two inputs are one tensor, a compiler takes them for one."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (model(x) - y).square().mean()

    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Linear(4, 4)

    x, wide = torch.randn(4, 4), torch.arange(36.0).reshape(4, 9) / 36
    whole = [(x, x), (x, x.clone()), (x.clone(), x), (x, x), (x, x[:]), (wide[:, :4], wide[:, 2:6])]
    reference = model()
    wanted = torch_loop(reference, whole, loss)
    for options in ({"capture": capture}, {"mode": "eager"}):
        trained = model()
        step = compiled(trained, loss, **options)
        found = [step(*batch) for batch in whole]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert_same_weights(trained, reference)
        assert len(step.programs) == (0 if "mode" in options else 3)  # equal, apart, and with another stride
