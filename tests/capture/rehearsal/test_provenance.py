"""What tensors of a real run depend on, and what it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusion_compile._capture.rehearsal.provenance import Depends, Provenance

NOTHING, INPUTS, RANDOM, CPU_READ = Depends.NOTHING, Depends.INPUTS, Depends.RANDOM, Depends.CPU_READ


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 2


def _gradient(x: Tensor) -> Tensor:
    leaf = torch.ones(3, requires_grad=True)
    return torch.autograd.grad((leaf * x.detach()).sum(), leaf)[0]


def _written_into(x: Tensor) -> Tensor:
    memory = torch.zeros(2, 3)
    memory[0].copy_(x.detach())
    return memory[1]


def _attention(x: Tensor) -> Tensor:
    x = x.view(1, 1, 1, 3)
    return F.scaled_dot_product_attention(x, x, x)


def _noise_by_row(x: Tensor) -> Tensor:
    noise: Tensor = torch.func.vmap(lambda row: torch.rand_like(row), randomness="different")(torch.ones(3))
    return noise


def _without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        return x + 1


def _inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x + 1


def _autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.ones(2, 3) @ x


def _read_by_the_cpu(x: Tensor) -> Tensor:
    return torch.tensor(float(x.detach().sum()))


def _decided_by_the_cpu(x: Tensor) -> Tensor:
    return torch.zeros(3) if bool((x > 0).any()) else torch.ones(3)


MADE: list[tuple[str, Callable[[Tensor], Tensor], Depends]] = [
    ("arange", lambda x: torch.arange(3.0), NOTHING),
    ("a list", lambda x: torch.tensor([1.0, 2.0]), NOTHING),
    ("of one shape", lambda x: torch.zeros_like(x), NOTHING),
    ("of one dtype", lambda x: x.new_full((2,), 3.0), NOTHING),
    ("a constant's view", lambda x: torch.eye(3).cos()[1:].t(), NOTHING),
    ("product", lambda x: x * 2, INPUTS),
    ("view", lambda x: (x * 2)[1:].unsqueeze(0), INPUTS),
    ("the input's view", lambda x: x[1:], INPUTS),
    ("written into", _written_into, INPUTS),
    ("out=", lambda x: torch.add(x.detach(), 1, out=torch.empty(3)), INPUTS),
    ("foreach", lambda x: torch._foreach_mul([x, x], 2)[1], INPUTS),
    ("noise", lambda x: torch.randn(3), RANDOM),
    ("noise of one shape", lambda x: torch.rand_like(x), RANDOM),
    ("noise in place", lambda x: torch.zeros(3).normal_(), RANDOM),
    ("permutation", lambda x: torch.randperm(3), RANDOM),
    ("dropout", lambda x: F.dropout(x, 0.5), INPUTS | RANDOM),
    ("dropout that is off", lambda x: F.dropout(x, 0.5, training=False), INPUTS),
    ("attention", _attention, INPUTS),
    ("own function", Doubled.apply, INPUTS),
    ("gradient", _gradient, INPUTS),
    ("checkpoint", lambda x: checkpoint(torch.cos, x, use_reentrant=False), INPUTS),
    ("vmap", torch.func.vmap(lambda row: row * 2), INPUTS),
    ("vmap of noise", _noise_by_row, RANDOM),
    ("grad", torch.func.grad(lambda x: (x**3).sum()), INPUTS),
    ("jvp", lambda x: torch.func.jvp(torch.sin, (torch.ones(3),), (x.detach(),))[1], INPUTS),
    ("no_grad", _without_grad, INPUTS),
    ("inference", _inference, INPUTS),
    ("autocast", _autocast, INPUTS),
    ("sparse", lambda x: x.detach().to_sparse(), INPUTS),
    ("read by the CPU", _read_by_the_cpu, CPU_READ),
    ("decided by the CPU", _decided_by_the_cpu, CPU_READ),
    ("of a size that depends", lambda x: torch.ones(len(x.detach().nonzero())), CPU_READ),
    ("a constant read by the CPU", lambda x: torch.zeros(int(torch.ones(3).sum())), NOTHING),
]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in MADE], ids=[case[0] for case in MADE])
def test_what_a_tensor_depends_on(make: Callable[[Tensor], Tensor], expected: Depends) -> None:
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    seen = Provenance([x])
    with seen:
        seen.next_run()
        made = make(x)
    assert seen.of(made) == expected
    assert seen.drew_random == bool(expected & RANDOM)


def test_freed_memory_that_is_used_again_is_another_tensors() -> None:
    x = torch.ones(1000)
    seen = Provenance([x])
    with seen:
        seen.next_run()
        for _ in range(20):
            dependent = x * 2
            del dependent
            assert seen.of(torch.zeros(1000)) == NOTHING


def test_no_activation_is_kept_alive() -> None:
    import weakref

    x = torch.ones(3)
    seen = Provenance([x])
    with seen:
        seen.next_run()
        made = x * 2
        made.add_(1)
        memory = weakref.ref(made.untyped_storage())
        del made
    assert memory() is None and seen.written() == []


def _norm(x: Tensor, norm: Any) -> None:
    norm(x)


def _through_a_view(x: Tensor, norm: Any) -> None:
    norm.running_mean[:1].add_(1)


def _foreach(x: Tensor, norm: Any) -> None:
    torch._foreach_add_([norm.running_mean, norm.running_var], 1)


def _by_an_optimizer(x: Tensor, norm: Any) -> None:
    norm.weight.grad = torch.ones(3)
    torch.optim.Adam([norm.weight]).step()


WRITES: list[tuple[Callable[[Tensor, Any], None], list[str]]] = [
    (_norm, ["num_batches_tracked", "running_mean", "running_var"]),
    (_through_a_view, ["running_mean"]),
    (_foreach, ["running_mean", "running_var"]),
    (_by_an_optimizer, ["weight"]),
]


@pytest.mark.parametrize(("write", "expected"), WRITES, ids=[write.__name__ for write, _ in WRITES])
def test_what_is_written_is_listed_and_put_back_bitwise(write: Any, expected: list[str]) -> None:
    norm = nn.BatchNorm1d(3)
    named = {**dict(norm.named_parameters()), **dict(norm.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in named.items()}
    seen = Provenance([])
    with seen:
        for _ in range(2):
            seen.next_run()
            write(torch.randn(4, 3), norm)
    written = seen.written(named.items())
    assert sorted(w.label for w in written) == expected
    assert {w.runs for w in written} == {(1, 2)} and {w.where.rpartition(":")[0] for w in written} == {__file__}
    assert [name for name, t in named.items() if not torch.equal(t, before[name])] == sorted(
        expected, key=[*named].index
    )
    seen.put_back()
    assert [name for name, tensor in named.items() if not torch.equal(tensor, before[name])] == []


def test_a_norm_in_evaluation_writes_nothing() -> None:
    norm = nn.BatchNorm1d(3).eval()
    with (seen := Provenance([])):
        seen.next_run()
        norm(torch.randn(4, 3))
    assert seen.written() == []


def test_declared_inputs_are_marked_and_put_back() -> None:
    x = torch.ones(3)
    with (seen := Provenance([x])):
        seen.next_run()
        x.mul_(2)
    (write,) = seen.written([("x", x)])
    assert write.declared and write.label == "x"
    seen.put_back()
    assert torch.equal(x, torch.ones(3))


def test_memory_that_was_resized_is_put_back() -> None:
    x = torch.ones(3)
    with (seen := Provenance([])):
        seen.next_run()
        x.resize_(5).fill_(7.0)
    x.resize_(3)
    seen.put_back()
    assert torch.equal(x, torch.ones(3)) and x.untyped_storage().nbytes() == 12


def test_the_numbers_before_each_run_are_known() -> None:
    count = torch.zeros(2)
    with (seen := Provenance([])):
        for _ in range(2):
            seen.next_run()
            count.add_(1)
    assert [seen.before_run(run, count[1]).item() for run in (1, 2, 3)] == [0.0, 1.0, 2.0]


def test_draws_are_counted_by_generator() -> None:
    own = torch.Generator()
    with (seen := Provenance([], generators=[("own", own)])):
        seen.next_run()
        torch.rand(2, generator=own)
        torch.zeros(2).bernoulli_(0.5, generator=own)
        torch.rand(2)
        torch.rand(2, generator=torch.Generator())
    assert seen.draws == {
        "own": 2,
        "torch's generator of the CPU": 1,
        "a generator that no slot leads to": 1,
    }
