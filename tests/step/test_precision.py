"""`compute_dtype` is autocast: the numbers are those of the ordinary loop under autocast, in every mode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile._step.precision import Precision
from tests.small_models import assert_same_weights, compiled, mlp

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "read": {"backend": "aot_eager", "capture": "read"},
    "run": {"backend": "aot_eager", "capture": "run"},
}
CPU = torch.device("cpu")
BF16 = torch.bfloat16


class Pair(nn.Module):
    """A method besides the forward, and a dictionary as the input."""

    def __init__(self) -> None:
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 8), nn.Linear(8, 2)

    def encode(self, x: Tensor) -> Tensor:
        out: Tensor = self.enc(x)
        return out

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.dec(self.enc(batch["x"]))
        return out


class Lora(nn.Module):
    """A trained low rank beside a frozen fp32 matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 8), nn.Linear(4, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


class Looped(nn.Module):
    """One weight used twice, a norm, and a checkpointed region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def block(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.inner(x)).tanh()
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, self.block(x), use_reentrant=False)
        return out


def is_itself(model: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(model, nn.Sequential)
    first: Tensor = model[0](x)
    return first.float().square().mean() * (2 if isinstance(model, nn.Sequential) else 0)


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "a method": (Pair, lambda m, x: m.dec(m.encode(x)).float().square().mean()),
    "a dictionary": (Pair, lambda m, x: m({"x": x}).float().square().mean()),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)),
        lambda m, x: m(x).float().sin().square().mean(),
    ),
    "LoRA over fp32": (Lora, lambda m, x: m(x).float().square().mean()),
    "index and isinstance": (lambda: nn.Sequential(nn.Linear(4, 8)), is_itself),
    "a weight used twice": (Looped, lambda m, x: m(x).float().sin().mean()),
    "a convolution": (
        lambda: nn.Sequential(nn.Conv1d(1, 3, 3), nn.GroupNorm(1, 3), nn.GELU()),
        lambda m, x: F.mse_loss(m(x[:, None]), x[:, None, :2].expand(-1, 3, -1)),
    ),
}


QUICK = {"LoRA over fp32"}
CASES = [
    pytest.param(program, way, marks=() if way == "eager" or program in QUICK else pytest.mark.exhaustive)
    for program in PROGRAMS
    for way in WAYS
]


def ordinary_loop(
    model: nn.Module, loss: Callable[..., Tensor], data: list[Tensor], region: Callable[[], Any], parts: int = 1
) -> list[float]:
    """Autocast around the loss, its backward outside, and torch's AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for x in data:
        optimizer.zero_grad()
        total = 0.0
        for part in x.chunk(parts):
            with region():
                with torch.autocast("cpu", BF16, cache_enabled=False):
                    value = loss(model, part)
                (value / parts).backward()
            total += float(value.detach()) / parts
        optimizer.step()
        losses.append(total)
    return losses


def both(
    make: Callable[[], nn.Module],
    loss: Callable[..., Tensor],
    *,
    keep: tuple[str, ...] = (),
    region: Callable[[nn.Module], Any] = lambda model: contextlib.nullcontext(),
    **options: Any,
) -> fc.TrainingStep:
    """Three steps; their losses and weights are those of the ordinary loop."""
    torch.manual_seed(3)
    model = make()
    reference, data = deepcopy(model), [torch.randn(8, 4) for _ in range(3)]
    step = compiled(model, loss, lr=1e-2, compute_dtype=BF16, keep_fp32=keep, **options)
    losses = [float(step(x)) for x in data]
    expected = ordinary_loop(reference, loss, data, lambda: region(reference), options.get("accumulate", 1))
    # Gradients are equal bit by bit. AdamW's own order of operations moves weights by their last bit, which moves the
    # next losses by at most a rounding of bf16 (2 to the -9) where it falls on another side.
    assert losses[0] == expected[0]
    assert losses == pytest.approx(expected, rel=2**-8)
    assert_same_weights(model, reference, rtol=1e-4, atol=1e-6)
    return step


@pytest.mark.parametrize(("program", "way"), CASES)
def test_the_numbers_are_those_of_autocast(program: str, way: str) -> None:
    both(*PROGRAMS[program], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_accumulation_is_that_of_the_ordinary_loop(way: str) -> None:
    both(mlp, lambda m, x: m(x).float().square().mean(), accumulate=2, **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_timesteps_and_conditioning_keep_their_values(way: str) -> None:
    """bf16 has 8 bits: 990 and 993 would both become 992, and a class embedding's scale of 1.001 would become 1."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.l(x) * batch["scale"][:, None], t * batch["scale"]

    def loss(model: nn.Module, x: Tensor, t: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        out, seen = model(x, t, {"scale": scale})
        return out.float().square().mean(), {"t": seen}

    step = compiled(Net(), loss, compute_dtype=BF16, **WAYS[way])
    t, scale = torch.tensor([990.0, 993.0, 995.0, 997.0]), torch.full((4,), 1.001)
    step(torch.randn(4, 4), t, scale)
    assert torch.equal(step.metrics["t"], t * scale)


# -- keep_fp32 ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outside_of_autocast(module: nn.Module) -> Any:
    """What people write by hand around a module that must not lose bits."""
    forward = module.forward

    def in_fp32(x: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):
            return forward(x.float())

    module.forward = in_fp32
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize("way", WAYS)
def test_a_module_that_is_kept_computes_in_fp32(way: str) -> None:
    step = both(
        mlp,
        lambda m, x: m(x).square().mean(),
        keep=("^2$",),
        region=lambda model: outside_of_autocast(model.get_submodule("2")),
        **WAYS[way],
    )
    assert "forward" not in vars(step.model.get_submodule("2"))


@pytest.mark.parametrize("way", WAYS)
def test_a_kept_module_is_kept_where_a_checkpoint_computes_it_again(way: str) -> None:
    step = both(
        Looped,
        lambda m, x: m(x).sin().mean(),
        keep=("inner",),
        region=lambda model: outside_of_autocast(model.get_submodule("inner")),
        **WAYS[way],
    )
    if way == "run":  # whose graph has the operators that autocast calls
        assert "bfloat16" not in str(step.programs[0].graph.graph)


def test_what_would_have_no_effect_is_refused() -> None:
    with pytest.raises(ValueError, match=r"keep_fp32: 'head' matches no module of the model; the names look like 0, 1"):
        compiled(mlp(), compute_dtype=BF16, keep_fp32=["head"])
    with pytest.raises(ValueError, match=r"keep_fp32=\['2'\] without a compute_dtype has no effect"):
        compiled(mlp(), keep_fp32=["2"])
    step = compiled(Pair(), lambda m, x: m.dec(m.encode(x)).square().mean(), compute_dtype=BF16, keep_fp32=["enc"])
    step(torch.randn(8, 4))
    unused = nn.ModuleDict({"used": nn.Linear(4, 2), "list": nn.ModuleList([nn.Linear(2, 2)])})
    step = compiled(unused, lambda m, x: m["used"](x).square().mean(), compute_dtype=BF16, keep_fp32=["^list$"])
    before = {n: p.detach().clone() for n, p in unused.named_parameters()}
    with pytest.raises(ValueError, match=r"'\^list\$' matches list, whose forward the loss does not call"):
        step(torch.randn(8, 4))
    assert all(torch.equal(p, before[n]) for n, p in unused.named_parameters())


def test_a_refused_expression_leaves_the_model_alone() -> None:
    model = mlp()
    places = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match="keep_fp32"):
        compiled(model, compute_dtype=BF16, keep_fp32=["head"])
    assert [p.data_ptr() for p in model.parameters()] == places


def test_the_forward_is_swapped_inside_alone() -> None:
    model = mlp()
    precision = Precision(model, BF16, CPU, ["^0$"])
    with precision.kept():
        assert model[0](torch.ones(1, 4, dtype=BF16)).dtype == torch.float32
    assert "forward" not in vars(model[0])
    precision.refuse_uncalled()
    model[0].forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"0\.forward was replaced"), precision.kept():
        pass
