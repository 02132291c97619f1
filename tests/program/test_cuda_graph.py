"""Replay with a stand-in for the GPU's recorder: what is copied, what is kept, and when it is recorded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile._compat import fake_mode
from fusion_compile._program.cuda_graph import Replay, why_not_captured
from fusion_compile._sampler.loop_body import LoopBody, loop_body
from fusion_compile._sampler.table.conditioning_table import bind_weights


class Recorder:
    """As a CUDA graph does, `replay` reads the inputs and the weights at the addresses they had, and writes the same
    outputs each time."""

    def __init__(self) -> None:
        self.recordings = 0

    def __call__(
        self, fn: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], Any], Sequence[Tensor]]:
        self.recordings += 1
        outputs = fn(*inputs)

        def replay() -> None:
            for own, new in zip(outputs, fn(*inputs), strict=True):
                own.copy_(new)

        return replay, outputs


def replayed() -> tuple[Replay, Recorder, list[Tensor]]:
    recorder, weights = Recorder(), [torch.tensor([2.0])]
    return Replay(lambda x: (x * weights[0],), lambda: weights, recorder), recorder, weights


def test_every_call_gives_its_own_result_in_memory_of_its_own() -> None:
    run, recorder, _ = replayed()
    x = torch.tensor([1.0])
    first = run(x)
    second = run(x + 4)
    assert first[0].item() == 2 and second[0].item() == 10 and recorder.recordings == 1
    second[0].zero_()
    assert run(x)[0].item() == 2
    assert x.item() == 1


def test_weights_written_in_place_are_read_and_weights_elsewhere_are_recorded_again() -> None:
    run, recorder, weights = replayed()
    x = torch.tensor([1.0])
    run(x)
    weights[0].mul_(3)
    assert run(x)[0].item() == 6 and recorder.recordings == 1
    weights[0] = torch.tensor([5.0])
    assert run(x)[0].item() == 5 and recorder.recordings == 2
    assert run(x)[0].item() == 5 and recorder.recordings == 2


def test_a_recording_that_failed_is_tried_again() -> None:
    run, recorder, _ = replayed()
    answers = [RuntimeError("no"), None]

    def record(*given: Any) -> Any:
        if (error := answers.pop(0)) is not None:
            raise error
        return recorder(*given)

    run._record = record
    x = torch.tensor([1.0])
    with pytest.raises(RuntimeError, match="no"):
        run(x)
    assert run(x)[0].item() == 2 and recorder.recordings == 1 and not answers


def body_on(device: str, fn: Callable[..., tuple[Tensor, ...]], w_device: str) -> LoopBody:
    """The loop's body made of `fn(x, w)` for tensors that have no data, on a GPU that need not be there."""
    with fake_mode(), torch.no_grad():
        x, w = torch.randn(3, 4, device=device), torch.randn(4, 4, device=w_device)
        graph_module = make_fx(fn)(x, w)
    name = str(list(graph_module.graph.find_nodes(op="placeholder"))[1].target)
    bind_weights(graph_module, {name: w})
    return loop_body(graph_module, [x], mode="max-autotune", backend="inductor")


def test_on_a_gpu_the_body_is_one_recording_where_it_can_be() -> None:
    assert body_on("cuda", lambda x, w: ((x @ w).sin().cos(),), "cuda").captured
    body = body_on("cpu", lambda x, w: ((x @ w).sin().cos(),), "cpu")
    assert not body.captured and body.not_captured is None
    waits = body_on("cuda", lambda x, w: ((x @ w).cpu(),), "cuda")
    assert not waits.captured and "host_sync" in str(waits.not_captured)
    mixed = body_on("cuda", lambda x, w: (x.sin().cos() + w.sum(),), "cpu")
    assert not mixed.captured and "cpu and cuda" in str(mixed.not_captured)


def test_what_a_cuda_graph_cannot_hold_is_told() -> None:
    x, w = torch.randn(3, 4), torch.randn(4, 4)
    pure = make_fx(lambda x, w: (x @ w,))(x, w)
    assert why_not_captured(pure, [x, w]) is None
    assert why_not_captured(pure, [x, w.to("meta")]) == "it reads tensors on cpu and meta."
    waits = make_fx(lambda x, w: (x[(x @ w) > 0],))(x, w)
    why = why_not_captured(waits, [x, w])
    assert why is not None and "the host waits for the count" in why
