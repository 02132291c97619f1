"""What belongs to a group beside its numbers: its names with its parameters, and numbers that are tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fusion_compile._torch_optim.group_record import GroupRecord, gradients_of, names_in


def test_names_go_with_parameters_of_all_groups() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    records, groups = [GroupRecord(["a"], {}, {}), GroupRecord(["b"], {}, {})], [{"params": [one]}, {"params": [two]}]
    assert records[0].pairs(groups[0]) == [("a", one)]
    assert names_in(records, groups) == {"a": one, "b": two}


def test_a_tensor_is_read_again_when_it_was_written() -> None:
    record, lr = GroupRecord([], {}, {}), torch.tensor(0.5)
    assert record.read("lr", lr) == 0.5 and record.tensors["lr"][1] == lr._version
    lr.fill_(0.25)
    assert record.read("lr", lr) == 0.25 and record.read("lr", 2) == 2.0


def test_gradients_that_no_bank_holds_are_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    assert gradients_of([("p", p)]) == {}
    p.grad = torch.ones(2)
    assert gradients_of([("p", p)])["p"] is p.grad
    p.grad = torch.ones(2).to_sparse()
    with pytest.raises(RuntimeError, match=r"the gradient of p \[2\] is sparse"):
        gradients_of([("p", p)])
