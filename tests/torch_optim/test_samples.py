"""A few entries of every parameter tell a write that counts no version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusion_compile._state.banks import Bank, build_layout
from fusion_compile._state.routing import route
from fusion_compile._torch_optim.samples import EACH, Samples


def banks_of(dtype: torch.dtype) -> list[tuple[Bank, Tensor]]:
    model = nn.Sequential(nn.Linear(128, 192), nn.Linear(192, 128), nn.Linear(128, 3)).to(dtype)
    layout = build_layout(model, route(model, ("spectral", "scalar")))
    joined = layout.join({n: p.detach() for n, p in model.named_parameters()}, in_state_dtype=False)
    assert {bank.matrix is None for bank in layout.banks} == {True, False}
    return [(bank, joined[bank.key]) for bank in layout.banks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_write_into_any_parameter_is_seen_and_the_users_stream_stays(dtype: torch.dtype) -> None:
    banks = banks_of(dtype)
    stream = torch.get_rng_state()
    samples = Samples(banks)
    assert torch.equal(torch.get_rng_state(), stream)
    assert samples.differ() is None
    samples.note()
    for bank, tensor in banks:
        for part in bank.split(tensor):
            assert not samples.differ()
            part.data[: max(1, part.shape[0] // 4)].mul_(1.5)
            assert samples.differ()
            samples.note()


def test_bits_are_compared_and_not_numbers() -> None:
    ((bank, tensor), *_) = banks_of(torch.float32)
    samples = Samples([(bank, tensor)])
    tensor.fill_(torch.nan)
    samples.note()
    assert not samples.differ()  # a nan that stays is no write
    tensor.zero_()
    samples.note()
    tensor.neg_()
    assert samples.differ()


def test_of_a_large_parameter_there_are_a_few_entries() -> None:
    ((_, tensor), *_) = banks = [pair for pair in banks_of(torch.float32) if pair[0].matrix is not None]
    samples = Samples(banks[:1])
    samples.note()
    assert tensor.numel() > 1000 * EACH / 10
    assert [len(noted) for noted in samples._noted] == [EACH * len(banks[0][0].places)]
