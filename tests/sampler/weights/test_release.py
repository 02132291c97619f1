"""Weights go out of memory and come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile._sampler.weights.release import ReleasableWeights, destination

ALL = frozenset({"0.weight", "0.bias", "1.weight", "1.bias"})


def two_layers() -> tuple[nn.Sequential, ReleasableWeights]:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    return model, ReleasableWeights(model)


def test_dropped_weights_are_empty_counted_and_restored_from_a_state_dict() -> None:
    model, weights = two_layers()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    released = weights.release(ALL, frozenset({"1.weight", "1.bias"}), None)
    assert (released.bytes, released.declined) == (4 * (6 + 3), {})
    assert weights.names == weights.dropped == {"0.weight", "0.bias"}
    assert model.get_parameter("0.weight").numel() == 0 and model.get_parameter("1.weight").numel() == 6
    with pytest.raises(ValueError, match="2 weights were dropped and nothing was given for them"):
        weights.restore(None)
    assert model.get_parameter("0.weight").numel() == 0
    weights.restore(state)
    assert weights.names == frozenset() and torch.equal(model.get_parameter("0.weight"), state["0.weight"])


def test_weights_on_the_device_already_do_not_move() -> None:
    model, weights = two_layers()
    assert weights.release(ALL, frozenset(), torch.device("cpu")).bytes == 0
    assert weights.names == frozenset() and model.get_parameter("0.weight").numel() == 6


def test_a_storage_that_something_holds_or_that_is_shared_is_declined_with_the_reason() -> None:
    model, weights = two_layers()
    held = model.get_parameter("0.weight").data
    model[1].bias = nn.Parameter(torch.zeros(4)[:2])
    declined = weights.release(ALL, frozenset({"1.weight"}), None).declined
    assert declined["0.weight"].startswith("something holds its memory")
    assert declined["1.bias"].startswith("it is part of a larger storage")
    assert set(declined) == {"0.weight", "1.bias"} and model.get_parameter("0.weight").is_set_to(held)


def test_what_needs_weights_that_are_out_is_refused_by_name() -> None:
    _, weights = two_layers()
    weights.refuse_if_out("a rebuild")
    weights.release(frozenset({"0.weight"}), frozenset(), None)
    with pytest.raises(RuntimeError, match=r"^a rebuild needs weights that release_weights took out .*0\.weight"):
        weights.refuse_if_out("a rebuild")
    with pytest.raises(RuntimeError, match=r"^a shape reads weights .*restore_weights first"):
        weights.refuse_if_out_among(["0.weight"], "a shape")
    with pytest.raises(RuntimeError, match=r"^a request needs weights .*dropped \(0\.weight.*, or keep it\.$"):
        weights.refuse_if_dropped(["0.weight"], "a request", "keep it")
    weights.refuse_if_dropped(["1.weight"], "a request", "keep it")
    weights.were_replaced(["0.weight"])
    weights.refuse_if_out("a rebuild")


def test_moved_weights_are_back_inside_the_block_and_out_after_it() -> None:
    model, weights = two_layers()
    weight = model.get_parameter("0.weight")
    contents = weight.detach().clone()
    weights._out["0.weight"], weights._kept["0.weight"] = weight, contents  # as a move to a device does
    weight.data = torch.empty(0)
    with weights.resident():
        assert torch.equal(model.get_parameter("0.weight"), contents)
    assert model.get_parameter("0.weight").numel() == 0 and weights.dropped == frozenset()
    weights.restore(None)
    assert torch.equal(model.get_parameter("0.weight"), contents)


def test_a_destination_is_drop_or_a_device_with_memory() -> None:
    assert destination("drop") is None
    assert destination("cpu") == destination(torch.device("cpu")) == torch.device("cpu")
    for wrong in ("disk", "cuda:99", 3.5):
        with pytest.raises(ValueError, match="use 'drop', or a device that is there, such as 'cpu'"):
            destination(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a meta device holds no contents"):
        destination("meta")


def test_a_tensor_of_another_shape_is_not_restored() -> None:
    """Nothing is put back then, and the right checkpoint still is."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    checkpoint = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = ReleasableWeights.of(model)
    weights.release(frozenset({"0.weight", "1.weight"}), frozenset(), None)
    released = weights.names
    assert "1.weight" in released
    for wrong, words in ((torch.zeros(3), r"1\.weight is \[3\] .* \[2, 3\] in the model"), (None, "is a NoneType")):
        with pytest.raises(ValueError, match=words):
            weights.restore({**checkpoint, "1.weight": wrong})  # type: ignore[dict-item]
        assert weights.names == released and model.get_parameter("0.weight").numel() == 0
    weights.restore(checkpoint)
    assert all(torch.equal(t, checkpoint[n]) for n, t in model.state_dict().items())
