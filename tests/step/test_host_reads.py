"""Reads of a tensor's value on the CPU are found at the user's line, and said in one sentence."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion_compile._step.host_reads import (
    HostRead,
    RefuseHostReads,
    host_read_message,
    not_captured_message,
    refused_graph_message,
    where_in_user_code,
)


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda t: t.cpu(), "tensor.cpu()"),
        (lambda t: t.numpy(), "tensor.numpy()"),
        (lambda t: repr(t), "printing a tensor"),
        (lambda t: f"{t}", "formatting a tensor"),
    ],
)
def test_each_read_is_refused_by_its_name(read: Callable[[Tensor], Any], name: str) -> None:
    with pytest.raises(HostRead) as caught, RefuseHostReads():
        read(torch.ones(2))
    assert str(caught.value) == name


def test_arithmetic_and_casts_pass() -> None:
    with RefuseHostReads():
        assert (torch.ones(2) + 1).to(torch.float64).dtype == torch.float64


def test_the_sentence_names_the_line_that_reads() -> None:
    try:
        with RefuseHostReads():
            torch.ones(2).cpu()
    except HostRead as error:
        frames = list(traceback.extract_tb(error.__traceback__))
    where = where_in_user_code(frames)
    assert where.startswith(f"{__file__}:") and where.endswith("torch.ones(2).cpu()")
    message = host_read_message(frames, "tensor.cpu()\nand a second line")
    assert message.startswith(f"{where}\nreads a tensor's value on the host") and "second line" not in message


def test_a_graph_that_the_compiler_refuses_is_named_by_the_users_line() -> None:
    frames = f'File "{torch.__file__}", line 1, in f\n  x\n  File "{__file__}", line 7, in g\n    y.resize_(2)'
    text = f'a storage of "meta".\n{frames}'
    message = refused_graph_message(RuntimeError(text))
    assert message.startswith(
        f"{__file__}:7: y.resize_(2)\nwas captured, but the compiler refuses the graph: a storage"
    )
    assert "eager" in message and "line 1" not in message


def test_without_a_users_frame_the_sentence_speaks_of_the_loss() -> None:
    assert where_in_user_code([]) == ""
    message = not_captured_message([], "Unsupported call\n  Developer debug context: call open\n")
    assert message.startswith("the loss\ncannot be captured as one graph (Unsupported call: call open).")
