"""Numpy in a batch: tensors in its place, the ordinary loop's numbers, and sentences for what no tensor holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile._step.arrays import from_numpy_takes_tensors, why_not, without_numpy
from tests.small_models import assert_same_weights, batches, compiled, mlp, torch_loop

CPU = torch.device("cpu")
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "read": {"backend": "aot_eager"},
    "run": {"backend": "aot_eager", "capture": "run"},
}


def from_numpy(m: nn.Module, x: Any, y: Any) -> Tensor:
    return F.mse_loss(m(torch.from_numpy(x)), torch.from_numpy(y))


def in_float64(m: nn.Module, b: dict[str, Any]) -> Tensor:
    assert torch.as_tensor(b["x"]).dtype == torch.float64  # as torch.from_numpy has it
    return F.mse_loss(m(torch.as_tensor(b["x"], dtype=torch.float32)), torch.as_tensor(b["y"], dtype=torch.float32))


def weighed(m: nn.Module, x: Any, y: Any, weight: Any) -> Tensor:
    return F.mse_loss(m(x), y) * weight


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


PROGRAMS: dict[str, tuple[Callable[[Any, Any], tuple[Any, ...]], Callable[..., Tensor]]] = {
    "from_numpy": (lambda x, y: (x, y), from_numpy),
    "float64 in a dictionary": (lambda x, y: ({"x": x.astype("f8"), "y": y.astype("f8")},), in_float64),
    "read only and backwards": (
        lambda x, y: (_read_only(x), y[::-1]),
        lambda m, x, y: F.mse_loss(m(torch.as_tensor(x.copy() if isinstance(x, np.ndarray) else x)), _ahead(y)),
    ),
    "a scalar": (lambda x, y: (torch.from_numpy(x), torch.from_numpy(y), np.float32(x[0, 0])), weighed),
}


def _ahead(array: Any) -> Tensor:
    return torch.as_tensor(array.copy() if isinstance(array, np.ndarray) else array)


@pytest.mark.filterwarnings("ignore:the step is captured by running it, because batch.2. is a plain number")
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if way == "eager" or name == "from_numpy" else pytest.mark.exhaustive)
        for name in PROGRAMS
        for way in WAYS
    ],
)
def test_a_batch_of_arrays_trains_as_in_the_ordinary_loop(name: str, way: str) -> None:
    make, loss = PROGRAMS[name]
    data = [make(x.numpy().copy(), y.numpy().copy()) for x, y in batches(3)]
    mine, reference = mlp(), mlp()
    step = compiled(mine, loss, lr=1e-2, **WAYS[way])
    losses = [step(*batch) for batch in data]
    expected = torch_loop(reference, data, loss, lr=1e-2)
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=1e-5, atol=0)  # AdamW's last bits
    assert_same_weights(mine, reference)
    assert torch.from_numpy.__module__ != "fusion_compile._step.arrays"


def test_accumulate_cuts_arrays() -> None:
    mine, reference = mlp(), mlp()
    step = compiled(mine, from_numpy, lr=1e-2, accumulate=2)
    for x, y in batches(2):
        step(x.numpy(), y.numpy())
    torch_loop(reference, batches(2), lr=1e-2)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)  # two sums of four in the place of one of eight


def test_memory_is_shared_where_torch_shares_it_and_dtypes_stay() -> None:
    whole, half, ids = np.zeros(3, "f4"), np.zeros(3, "f2"), np.arange(3)
    found = without_numpy((whole, half, [ids], whole[::-1], np.int64(3), np.bool_(True), "a"), CPU)
    assert found[0].data_ptr() == whole.ctypes.data and found[3].data_ptr() != whole.ctypes.data
    assert [found[0].dtype, found[1].dtype, found[2][0].dtype] == [torch.float32, torch.float16, torch.int64]
    assert type(found[4]) is int and found[5] is True and found[6] == "a"


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (np.array(["cat"]), r"batch\[2\] is a numpy array <U3 \[1\], whose dtype .* leave out of the batch what"),
        (np.array([None]), r"batch\[2\] is a numpy array object \[1\]"),
        (np.zeros(2, dtype=">f4"), r"batch\[2\] is a numpy array >f4 \[2\], whose dtype \(or byte order\) no tensor"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), r"whose mask a tensor would lose; give the data and the mask"),
        (np.complex64(1j), r"batch\[2\] is a complex64"),
    ],
)
def test_what_no_tensor_can_hold_is_named(odd: Any, words: str) -> None:
    step = compiled(mlp(), lambda m, x, y, z: F.mse_loss(m(x), y), mode="eager")
    x, y = batches(1)[0]
    with pytest.raises(TypeError, match=words):
        step(x, y, odd)
    assert step.steps_called == 0


def test_from_numpy_takes_tensors_inside_only() -> None:
    x = torch.zeros(2)
    with from_numpy_takes_tensors():
        assert torch.from_numpy(x).data_ptr() == x.data_ptr()
        assert torch.from_numpy(np.ones(2)).dtype == torch.float64
    with pytest.raises(TypeError, match=r"expected np\.ndarray"):
        torch.from_numpy(x)
    assert why_not(np.ones(2)) == ""
