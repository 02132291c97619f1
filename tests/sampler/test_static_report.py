"""What a report knows before anything has run."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from fusion_compile._sampler.graph.call import take_apart
from fusion_compile._sampler.graph.export import trace_denoiser
from fusion_compile._sampler.graph.roles import assign_roles
from fusion_compile._sampler.split import SplitDenoiser, split_denoiser
from fusion_compile._sampler.static_report import static_report, weights_by_time


class Tied(nn.Module):
    """A weight that the timestep and the latent read, one that nothing reads, and a buffer of the label's part."""

    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.time, self.out, self.unread = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 3)
        self.out.weight = self.time.weight
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.out(x) * self.time(t[:, None].expand(-1, 4)) + (y[:, None] + self.offset).exp()
        return out


def split() -> SplitDenoiser:
    model = Tied().eval()
    signature = inspect.signature(model.forward)
    call = take_apart(signature, (torch.randn(2, 4), torch.ones(2), torch.ones(2)), {})
    traced = trace_denoiser(model, call)
    return split_denoiser(traced, call, assign_roles(call.arguments, None), n_steps=5)


def test_a_weight_counts_once_at_its_latest_time() -> None:
    made = split()
    found = weights_by_time(made.traced.weights, made.full_names, made.hoisted)
    names = {time: set(tensors) for time, tensors in found.items() if tensors}
    assert names.pop("live") in ({"time.weight", "out.bias"}, {"out.weight", "out.bias"})
    assert names == {"step": {"time.bias"}, "request": {"offset"}, "unread": {"unread.weight", "unread.bias"}}


def test_parameters_and_bytes_are_counted_by_the_place_that_reads_them() -> None:
    report = static_report(split(), model="Tied", mode="eager", rows="batched")
    assert report.parameters == {"table": 4, "prologue": 4, "body": 16 + 4, "unread": 9 + 3}
    assert report.weight_bytes == {place: 4 * count for place, count in report.parameters.items()}
    assert report.inputs == ("x float32[2, 4] cpu", "t float32[2] cpu", "y float32[2] cpu")
    assert (report.model, report.mode, report.rows, report.n_steps) == ("Tied", "eager", "batched", 5)
    assert report.measured_difference is None and report.released == 0 and report.byte_budget == "automatic"


def test_a_table_has_a_row_for_each_step_and_one_for_the_request() -> None:
    made = split()
    report = static_report(made, model="Tied", mode="eager", rows="exact")
    per_step = sum(b.total * 4 for b in made.buffers if b.time.per_step)
    once = sum(b.total * 4 for b in made.buffers if not b.time.per_step)
    assert report.table_bytes == 5 * per_step + once and per_step > 0 and once > 0
    assert report.residuals == 2
