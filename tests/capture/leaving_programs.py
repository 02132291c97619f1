"""Small training programs, and what each leaves behind: label -> kind."""

from __future__ import annotations

import collections
import contextvars
import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.capture.small_programs import Loss, Part, around, mse

Program = tuple[nn.Module, Loss]
PROGRAMS: list[tuple[Callable[[], Program], dict[str, str]]] = []
AVERAGE: Any = None
VARIABLE = contextvars.ContextVar("VARIABLE", default=0)
LOCAL = threading.local()
SETTINGS = types.SimpleNamespace(seen=0)


def leaves(expected: dict[str, str]) -> Callable[[Callable[[], Program]], Callable[[], Program]]:
    def add(make: Callable[[], Program]) -> Callable[[], Program]:
        PROGRAMS.append((make, expected))
        return make

    return add


@leaves({"model.1.table": "cache"})
def a_table_that_is_none_at_first() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.table is None:
            part.table = torch.arange(8.0).cos()
        return x * part.table

    return around(Part(forward, table=None)), mse


@leaves({"model.1.tables[8]": "cache"})
def a_dictionary_of_tables() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if x.shape[0] not in part.tables:
            part.tables[x.shape[0]] = torch.arange(8.0).sin().to(x.dtype)
        return x * part.tables[x.shape[0]]

    return around(Part(forward, tables={})), mse


@leaves({"model.1.tables": "cache"})
def a_list_of_tables() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if not part.tables:
            part.tables += [torch.ones(8), torch.full((8,), 2.0)]
        return x * part.tables[1]

    return around(Part(forward, tables=[])), mse


@leaves({"model.1.late": "cache"})
def a_buffer_that_is_registered_late() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if not hasattr(part, "late"):
            part.register_buffer("late", torch.zeros_like(x[0]) + 3)
        return x * part.late

    return around(Part(forward)), mse


@leaves({"model.1.size": "cache", "model.1.table": "cache"})
def a_table_and_its_length() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if x.shape[0] > part.size:
            part.size, part.table = x.shape[0], torch.arange(float(x.shape[0]))[:, None]
        return x * part.table

    return around(Part(forward, size=0, table=None)), mse


class WithCachedProperty(nn.Module):
    @functools.cached_property
    def table(self) -> Tensor:
        return torch.arange(8.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


@leaves({"model.1.table": "cache"})
def a_cached_property() -> Program:
    return around(WithCachedProperty()), mse


@leaves({"model.1.mask": "cache"})
def a_mask_made_anew_each_time() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        part.mask = torch.ones(8)
        return x * part.mask

    return around(Part(forward, mask=None)), mse


@leaves({"model.1.projection": "drawn once"})
def a_random_projection() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.projection is None:
            part.projection = torch.randn(8, 8)
        return F.dropout(x @ part.projection, 0.3)

    return around(Part(forward, projection=None)), mse


@leaves({"model.1.projection": "drawn once"})
def a_projection_drawn_by_numpy() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.projection is None:
            part.projection = torch.tensor(np.random.rand(8), dtype=torch.float32)
        return x * part.projection

    return around(Part(forward, projection=None)), mse


@leaves({"model.1.offset": "initialised once"})
def an_offset_from_the_first_batch() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.offset is None:
            part.offset = x.detach().mean(0)
        return x - part.offset

    return around(Part(forward, offset=None)), mse


@leaves({"model.1.scale": "initialised once"})
def a_scale_that_the_cpu_read() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.scale is None:
            part.scale = torch.tensor(x.detach().abs().max().item())
        return x / part.scale

    return around(Part(forward, scale=None)), mse


@leaves({"model.1.ready": "initialised once"})
def a_codebook_filled_at_first() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if not part.ready:
            part.codes.copy_(x.detach()[:4])
            part.ready = True
        return x + part.codes.mean(0)

    part = Part(forward, ready=False)
    part.register_buffer("codes", torch.zeros(4, 8))
    return around(part), mse


@leaves({"model.1.first": "initialised once"})
def a_first_run_that_updates_no_average() -> Program:
    """The loss of the first run is the same either way; what differs is the buffer afterwards."""

    def forward(part: Any, x: Tensor) -> Tensor:
        out = x - part.average
        if not part.first:
            part.average.lerp_(x.detach().mean(0), 0.1)
        part.first = False
        return out

    part = Part(forward, first=True)
    part.register_buffer("average", torch.zeros(8))
    return around(part), mse


@leaves({"model.1.first": "initialised once", "model.1.table": "cache"})
def a_table_beside_a_first_flag() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.table is None:
            part.table = torch.arange(8.0)
        if part.first:
            part.first = False
            return x * part.table
        return x * part.table * 0.5

    return around(Part(forward, first=True, table=None)), mse


@leaves({"model.1.mean": "state"})
def a_running_mean() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        part.mean = 0.9 * part.mean + 0.1 * x.detach().mean(0)
        return x - part.mean

    return around(Part(forward, mean=torch.zeros(8))), mse


@leaves({"model.1.hidden": "state"})
def a_hidden_state_that_is_none_at_first() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        hidden = x if part.hidden is None else torch.tanh(x + part.hidden)
        part.hidden = hidden.detach()
        return hidden

    return around(Part(forward, hidden=None)), mse


@leaves({"model.1.memory": "state"})
def a_memory_made_at_first_and_then_written() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.memory is None:
            part.memory = torch.zeros(2, 8)
        part.memory[0] += x.detach().mean(0)
        return x + part.memory[0]

    return around(Part(forward, memory=None)), mse


@leaves({"model.1.stats": "state"})
def a_dictionary_made_at_first_and_then_changed() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        if part.stats is None:
            part.stats = {"mean": torch.zeros(8)}
        part.stats["mean"] = 0.5 * part.stats["mean"] + x.detach().mean(0)
        return x

    return around(Part(forward, stats=None)), mse


@leaves({"AVERAGE": "state"})
def an_average_in_a_global() -> Program:
    global AVERAGE
    AVERAGE = torch.ones(())

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        global AVERAGE
        value = mse(model, x, y)
        AVERAGE = 0.5 * AVERAGE + 0.5 * value.detach()
        return value / AVERAGE

    return around(nn.Tanh()), loss


@leaves({"Averaging.average": "state"})
def an_average_in_a_class() -> Program:
    Averaging.average = torch.ones(())
    return around(nn.Tanh()), Averaging()


class Averaging:
    average: Tensor

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = mse(model, x, y)
        Averaging.average = 0.5 * Averaging.average + value.detach()
        return value / Averaging.average


@leaves({"model.1.auxiliary": "state"})
def a_loss_term_in_an_attribute() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        part.auxiliary = x.square().mean()
        return x

    model = around(Part(forward, auxiliary=None))
    return model, lambda m, x, y: mse(m, x, y) + m[1].auxiliary


@leaves({"loss_fn<calls>": "number", "SETTINGS.seen": "number", "loss_fn<phase>['now']": "number"})
def numbers_in_a_closure_a_global_object_and_a_dictionary() -> Program:
    calls, phase = 0, {"now": "a"}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        SETTINGS.seen += 2
        phase["now"] += "b"
        return mse(model, x, y)

    return around(nn.Tanh()), loss


@leaves({"loss_fn<average>['value']": "number"})
def an_average_of_python_floats() -> Program:
    average: dict[str, float] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = mse(model, x, y)
        average["value"] = 0.9 * average.get("value", value.item()) + 0.1 * value.item()
        return value / average["value"]

    return around(nn.Tanh()), loss


@leaves({"loss_fn<first>['classes']": "initialised once"})
def a_count_that_the_cpu_read_once() -> Program:
    first: dict[str, int] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "classes" not in first:
            first["classes"] = int((y > 0).sum())
        return mse(model, x, y) * first["classes"]

    return around(nn.Tanh()), loss


@leaves({"VARIABLE.get()": "number", "LOCAL.count": "number"})
def a_context_variable_and_a_thread_local_value() -> Program:
    LOCAL.count = 0

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        VARIABLE.set(VARIABLE.get() + 1)
        LOCAL.count += 1
        return mse(model, x, y) * VARIABLE.get()

    return around(nn.Tanh()), loss


@leaves({"loss_fn<made>['part']": "drawn once"})
def a_module_made_at_first() -> Program:
    made: dict[str, nn.Module] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "part" not in made:
            made["part"] = nn.Linear(4, 2)
        return mse(model, x, y) + F.mse_loss(made["part"](x), y)

    return around(nn.Tanh()), loss


@leaves({"loss_fn<made>['teacher']": "initialised once"})
def a_teacher_copied_at_first() -> Program:
    made: dict[str, nn.Module] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if "teacher" not in made:
            made["teacher"] = copy.deepcopy(model).requires_grad_(False)
        return F.mse_loss(model(x), y) + F.mse_loss(model(x), made["teacher"](x + 0.1))

    return around(nn.Tanh()), loss


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


@leaves({"model.1.counts.count": "number"})
def a_number_in_a_slot() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        part.counts.count += 1
        return x

    return around(Part(forward, counts=Slotted())), mse


@leaves({"loss_fn<log>": "grows"})
def a_log_of_losses() -> Program:
    log: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = mse(model, x, y)
        log.append(value.detach())
        return value

    return around(nn.Tanh()), loss


@leaves({"loss_fn<last>[0]": "state", "loss_fn<last>[1]": "state"})
def a_full_deque() -> Program:
    last = collections.deque([torch.zeros(()), torch.ones(())], maxlen=2)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        value = mse(model, x, y)
        last.append(value.detach() + last[-1])
        return value

    return around(nn.Tanh()), loss


@leaves({"model.1._forward_hooks": "grows"})
def a_hook_registered_each_time() -> Program:
    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        model[1].register_forward_hook(lambda module, inputs, output: output * 0.9)
        return mse(model, x, y)

    return around(nn.Tanh()), loss


@leaves({"loss_fn<schedule>": "shrinks"})
def a_schedule_that_is_popped() -> Program:
    schedule = [0.1, 0.2, 0.3]
    return around(nn.Tanh()), lambda m, x, y: mse(m, x, y) * schedule.pop(0)


@leaves({"loss_fn<counts>": "same object mutated"})
def an_array_that_counts() -> Program:
    counts = np.zeros(3)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        counts[1] += 1
        return mse(model, x, y)

    return around(nn.Tanh()), loss


@leaves({f"model.1.norms[0].{name}": "written" for name in ("running_mean", "running_var", "num_batches_tracked")})
def a_batch_norm_in_a_plain_list() -> Program:
    return around(Part(lambda part, x: part.norms[0](x), norms=[nn.BatchNorm1d(8)])), mse


@leaves({"loss_fn<teacher>.weight": "written", "loss_fn<teacher>.bias": "written"})
def a_teacher_averaged_in_the_loss() -> Program:
    student, teacher = nn.Linear(4, 2), nn.Linear(4, 2).requires_grad_(False)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            for mine, its in zip(teacher.parameters(), model.parameters(), strict=True):
                mine.lerp_(its, 0.5)
        return F.mse_loss(model(x), teacher(x))

    return student, loss


@leaves({"loss_fn<codes>": "written"})
def codes_replaced_by_data() -> Program:
    codes = torch.zeros(8)

    def loss(model: Any, x: Tensor, y: Tensor) -> Tensor:
        codes.data = 0.5 * codes + model[0](x).detach().mean(0)
        return mse(model, x, y)

    return around(nn.Tanh()), loss


def _discriminator(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Program:
    judge = nn.Linear(2, 1)
    its = optimizer(judge.parameters(), lr=0.1, **options)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        made = model(x)
        its.zero_grad()
        (F.softplus(-judge(y)) + F.softplus(judge(made.detach()))).mean().backward()
        its.step()
        return F.softplus(-judge(made)).mean()

    return around(nn.Tanh()), loss


@leaves(
    {f"loss_fn<judge>.{name}.grad": "state" for name in ("weight", "bias")}
    | {f"loss_fn<judge>.{name}": "written" for name in ("weight", "bias")}
    | {f"loss_fn<its>.state[loss_fn<judge>.{name}]": "state" for name in ("weight", "bias")}
)
def a_discriminator_trained_in_the_loss() -> Program:
    return _discriminator(torch.optim.AdamW)


@leaves({})
def an_lstm_that_lists_its_weights() -> Program:
    return around(Part(lambda part, x: part.lstm(x)[0], lstm=nn.LSTM(8, 8))), mse


@leaves({"loss_fn<last>['x']": "state"})
def a_batch_that_is_kept() -> Program:
    last: dict[str, Tensor] = {}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        last["x"] = x
        return mse(model, x, y)

    return around(nn.Tanh()), loss


@leaves({"loss_fn<numbers>": "other"})
def an_iterator() -> Program:
    numbers = iter([1.0, 2.0, 3.0])
    return around(nn.Tanh()), lambda m, x, y: mse(m, x, y) * next(numbers)


@leaves({})
def nothing_left_behind() -> Program:
    def forward(part: Any, x: Tensor) -> Tensor:
        kept = [x, x.tanh()]
        kept.append(checkpoint(lambda h: F.dropout(part.norm(h), 0.5), x, use_reentrant=False))
        return torch.func.vmap(lambda row: row * 2)(sum(kept))

    return around(Part(forward, norm=nn.BatchNorm1d(8))), mse
