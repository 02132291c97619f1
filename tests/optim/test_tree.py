"""The verbs on dictionaries of tensors: what they compute, in which order, and that they share no memory."""

from __future__ import annotations

import torch

from fusion_compile.optim import _tree
from fusion_compile.optim._tree import map_tensors, number_like

A = {"a": torch.tensor([0.1, 3.0]), "b": torch.tensor([[7.0]])}
B = {"b": torch.tensor([[0.3]]), "a": torch.tensor([0.7, -1.0])}
BETA = torch.tensor(0.9)


def test_a_function_gets_the_tensors_of_one_key_in_the_order_of_the_first_tree() -> None:
    found = map_tensors(lambda x, y, z: x - y * z, A, B, A)
    assert list(found) == ["a", "b"]
    assert all(torch.equal(found[k], A[k] - B[k] * A[k]) for k in A)


def test_every_verb_is_its_formula_bit_by_bit() -> None:
    for found, wanted in (
        (_tree.lerp(A, B, BETA), {k: A[k] + BETA * (B[k] - A[k]) for k in A}),
        (_tree.update_mean(A, B, BETA), {k: A[k] + (1 - BETA) * (B[k] - A[k]) for k in A}),
        (_tree.weighted_mean(A, B, BETA), {k: BETA * A[k] + (1 - BETA) * B[k] for k in A}),
        (_tree.update_mean_square(A, B, BETA), {k: A[k] * BETA + (1 - BETA) * B[k] * B[k] for k in A}),
        (_tree.zeros_like(A), {k: 0 * A[k] for k in A}),
    ):
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in A)


def test_a_copy_has_memory_of_its_own() -> None:
    copied = _tree.copy(A)
    assert all(torch.equal(copied[k], A[k]) and copied[k].data_ptr() != A[k].data_ptr() for k in A)


def test_a_number_has_the_dtype_and_device_of_the_tree() -> None:
    number = number_like({"w": torch.zeros(2, dtype=torch.float64)}, 0.1)
    assert number.shape == () and number.dtype == torch.float64 and float(number) == 0.1
    assert number_like({"w": torch.zeros(2, device="meta")}, 1).device.type == "meta"
    assert number_like({}, 1).dtype == torch.float32
