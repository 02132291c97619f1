"""One sampler at many shapes: exported twice, derived for the rest, each bitwise what the model computes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from dit import DiT
from torch import Tensor, nn

from fusion_compile._sampler.graph.by_shape import GraphsByShape
from fusion_compile._sampler.graph.call import take_apart
from fusion_compile.sampler import Sampler, optimize_sampler
from tests.convolutional_denoiser import Convolutional, noise

pytestmark = pytest.mark.filterwarnings("ignore:the sampler was called with more than")


def randomized(model: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def sampler_of(model: nn.Module, **options: Any) -> Sampler:
    return optimize_sampler(randomized(model), 2, mode="eager", **options)


def graphs(sampler: Sampler) -> GraphsByShape:
    return sampler._programs._graphs


def is_exact(sampler: Sampler, *args: Any, **kwargs: Any) -> bool:
    with torch.no_grad():
        return torch.equal(sampler(*args, **kwargs), sampler.model(*args, **kwargs))


def test_another_batch_is_exported_once_more_and_every_further_one_is_derived() -> None:
    sampler = sampler_of(DiT(hidden_size=16, depth=1, num_heads=2))
    exports = []
    for batch in (1, 2, 3, 5):
        y = torch.randint(0, 10, (batch,))
        for t in sampler.timesteps:
            assert is_exact(sampler, torch.randn(batch, 1, 8, 8), t.expand(batch), y)
        exports.append(graphs(sampler).n_exports)
    assert exports == [1, 2, 2, 2]


def test_batch_resolution_and_text_length_vary_together() -> None:
    sampler = sampler_of(Convolutional())
    exports = []
    for sizes in ((2, 8, 8, 5), (3, 8, 12, 5), (3, 10, 12, 7), (4, 14, 6, 3)):
        assert is_exact(sampler, *noise(*sizes))
        exports.append(graphs(sampler).n_exports)
    assert exports == [1, 2, 3, 3]


def test_a_size_of_one_is_never_served_by_a_graph_for_more() -> None:
    sampler = sampler_of(Convolutional())
    for batch, exports in ((2, 1), (3, 2), (1, 3), (4, 3)):  # one export for the batch of 1 by itself
        assert is_exact(sampler, *noise(batch, 8, 8, 5))
        assert graphs(sampler).n_exports == exports


def test_the_other_side_of_a_branch_on_a_size_is_another_graph() -> None:
    sampler = sampler_of(Convolutional(branch=True))
    for rows, exports in ((4, 1), (6, 2), (10, 3), (12, 3)):  # halved, these are 2, 3, 5 and 6
        assert is_exact(sampler, *noise(2, rows, 8, 5))
        assert graphs(sampler).n_exports == exports
    small, _ = next(iter(graphs(sampler)._families.values())).symbolic
    line = inspect.getsourcelines(Convolutional.forward)[1] + 7
    refusal = small.refuses(take_apart(sampler._signature, noise(2, 12, 8, 5), {}))
    assert refusal is not None and "x.shape[2]" in refusal and f"convolutional_denoiser.py:{line})" in refusal


class _Twos(nn.Module):
    """Special for a batch of two, or, with `always`, for every batch: what Chroma does when it builds a list."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.inner, self.always = nn.Linear(1, 6), always

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = x * self.inner(t[:, None])
        if self.always:
            out = out + torch.tensor([1.0] * x.shape[0])[:, None]
        return out * 3 if x.shape[0] == 2 else out


def test_a_batch_that_only_one_number_is_special_for_becomes_a_symbol_at_the_next() -> None:
    sampler = sampler_of(_Twos(always=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch, exports in ((3, 1), (2, 2), (4, 3), (5, 3), (3, 3), (2, 3)):
            assert is_exact(sampler, torch.randn(batch, 6), torch.full((batch,), 0.5))
            assert graphs(sampler).n_exports == exports


def test_a_silently_fixed_batch_is_noticed_said_once_and_exported_by_itself() -> None:
    sampler = sampler_of(_Twos(always=True))
    assert is_exact(sampler, torch.randn(3, 6), torch.full((3,), 0.5))
    assert is_exact(sampler, torch.randn(4, 6), torch.full((4,), 0.5))
    line = inspect.getsourcelines(_Twos.forward)[1] + 3
    with pytest.warns(
        UserWarning, match=rf"_Twos makes numbers of x.shape\[0\], t.shape\[0\] \(.*shapes.py:{line}\)"
    ) as said:
        assert is_exact(sampler, torch.randn(5, 6), torch.full((5,), 0.5))
        assert is_exact(sampler, torch.randn(6, 6), torch.full((6,), 0.5))
    assert len([w for w in said if "makes numbers" in str(w.message)]) == 1
    assert graphs(sampler).n_exports == 4


def test_a_model_that_takes_no_symbols_is_exported_for_each_size() -> None:
    class Numeric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 6)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not isinstance(x.shape[0], int):
                raise TypeError("a number is wanted")
            return x * self.inner(t[:, None])

    sampler = sampler_of(Numeric())
    assert is_exact(sampler, torch.randn(3, 6), torch.full((3,), 0.5))
    x, t = torch.randn(4, 6), torch.full((4,), 0.5)
    with pytest.warns(UserWarning, match=r"Numeric cannot be exported with symbols for x.shape\[0\].*number is wanted"):
        assert is_exact(sampler, x, t)
    assert vars(x) == vars(t) == {}  # torch marks what it fails to export as dynamic, and torch.compile would see that
    assert is_exact(sampler, torch.randn(5, 6), torch.full((5,), 0.5))
    assert graphs(sampler).n_exports == 4  # one of them in vain


class _Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Linear(1, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor, t: Tensor, height: int = 1) -> Tensor:
        out: Tensor = self.late(x).reshape(x.shape[0], -1).view(x.shape) * self.early(t[:, None])[:, None] * height
        with torch.autocast("cpu", enabled=False):
            return out + x.flatten(1).reshape(x.shape)


def test_a_tensor_that_lies_otherwise_in_memory_gets_a_program_of_its_own() -> None:
    sampler = sampler_of(_Views())
    for batch in (2, 3, 4):
        t = torch.full((batch,), 0.5)
        assert is_exact(sampler, torch.randn(batch, 4, 6), t)
        assert is_exact(sampler, torch.randn(batch, 6, 4).transpose(1, 2), t)
        assert is_exact(
            sampler, torch.randn(batch, 4, 6), torch.tensor(0.5).expand(batch)
        )  # a vector's strides do not count
    assert len(sampler._programs) == 4


def test_beyond_the_bound_the_message_says_what_varies() -> None:
    sampler = sampler_of(_Views())
    with pytest.warns(
        UserWarning, match=r"more than 4.*\(x float32\[2, 4, 6\] cpu / float32\[3, .*; height 1 / 2\)"
    ) as said:
        for batch, height in ((2, 1), (3, 1), (4, 1), (4, 2), (2, 2), (3, 2)):
            assert is_exact(sampler, torch.randn(batch, 4, 6), torch.full((batch,), 0.5), height)
    assert len(said) == 1 and len(sampler._programs) == 4
    assert "float32[2]" in str(said[0].message) and "autocast" not in str(said[0].message)


def test_a_replaced_parameter_is_read_at_the_next_shape_too() -> None:
    sampler = sampler_of(Convolutional())
    for batch in (2, 3):
        assert is_exact(sampler, *noise(batch, 8, 8, 5))
    sampler.model.get_submodule("scale").weight = nn.Parameter(torch.randn(8, 1))
    assert is_exact(sampler, *noise(4, 8, 8, 5))
    sampler.model.act = nn.Tanh().eval()
    with pytest.warns(UserWarning, match="the sampler is built again"):
        assert is_exact(sampler, *noise(5, 8, 8, 5))


def _move_to_main_memory(sampler: Sampler, weights: Mapping[str, Tensor]) -> None:
    """On a CPU to="cpu" moves nothing; this is what it does on a GPU."""
    for name, weight in weights.items():
        sampler._weights._out[name], sampler._weights._kept[name] = weight, weight.detach().clone()
        weight.data = torch.empty(0)


def test_a_new_shape_fetches_what_was_moved_away_and_refuses_without_what_was_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampler = sampler_of(Convolutional())
    for batch in (2, 3):
        assert is_exact(sampler, *noise(batch, 8, 8, 5))
    moved = {n: p for n, p in sampler.model.named_parameters() if n.startswith(("scale", "text"))}
    contents = {n: p.detach().clone() for n, p in moved.items()}
    _move_to_main_memory(sampler, moved)
    for program in sampler._programs.values():
        program.accept_weights()
    args = noise(4, 8, 8, 5)
    served = sampler(*args)
    assert graphs(sampler).n_exports == 2 and all(p.numel() == 0 for p in moved.values())
    table = sampler._programs.values()[-1].table
    fills: list[object] = []
    fill = table.compute

    def counted(*args: Any) -> Any:
        fills.append(args)
        return fill(*args)

    monkeypatch.setattr(table, "compute", counted)
    assert torch.equal(sampler(*args), served) and not fills  # what it knows of the weights outlives their visit
    sampler.restore_weights()
    with torch.no_grad():
        assert torch.equal(served, sampler.model(*args))
    assert all(torch.equal(p, contents[n]) for n, p in moved.items())

    sampler.release_weights(to="drop")
    with pytest.raises(RuntimeError, match=r"the table of a new shape needs weights.*dropped.*prepare every shape"):
        sampler(*noise(6, 8, 8, 5))
    sampler.restore_weights(contents)
    assert is_exact(sampler, *noise(6, 8, 8, 5))


def test_a_new_shape_whose_loop_reads_freed_weights_is_refused() -> None:
    sampler = sampler_of(Convolutional())
    assert is_exact(sampler, *noise(2, 8, 8, 5))
    _move_to_main_memory(sampler, {"up.bias": sampler.model.get_parameter("up.bias")})
    with pytest.raises(RuntimeError, match=r"the loop at this shape reads weights .*up.bias.*restore_weights"):
        sampler(*noise(3, 8, 8, 5))
    assert len(sampler._programs) == 1
