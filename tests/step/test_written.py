"""A forward that writes its own weight: the write stays, as in the ordinary loop, whatever the recipe and the dtype."""

from __future__ import annotations

import contextlib
from copy import deepcopy
from typing import Any

import pytest
import schedulefree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusion_compile import optim
from fusion_compile._state import keys
from fusion_compile._step.written import Written, with_written_point
from fusion_compile.optim._transform import EmptyState, Extras, Transform
from tests.small_models import assert_same_weights, batches, compiled

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "read": {"backend": "aot_eager", "capture": "read"},
    "run": {"backend": "aot_eager", "capture": "run"},
}


class Unit(nn.Linear):
    """EDM2: rows are normalized in place by each training forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))
        return x @ self.weight.t()


class UnitData(nn.Linear):
    """The same through ``.data``, which counts no version."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.div_(self.weight.data.norm(dim=1, keepdim=True))
        return F.linear(x, self.weight)


class Rebound(nn.Linear):
    """The same, with another tensor in the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = F.normalize(self.weight.data, dim=1)
        return F.linear(x, self.weight)


class Clamped(nn.Linear):
    """CLIP's temperature: a clamp before use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.clamp_(0.8, 1.2)
        return F.linear(x, self.weight) * self.scale


def model(kind: type[nn.Linear]) -> nn.Sequential:
    torch.manual_seed(1)
    own = kind(8, 8) if kind is Clamped else kind(8, 8, bias=False)
    return nn.Sequential(nn.Linear(4, 8), own, nn.Linear(8, 2))


def loss_fn(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(m(x).float(), y)


def cases(*kinds: type[nn.Linear]) -> list[Any]:
    """Every way for the first kind; the others uncompiled, and in every way on demand."""
    return [
        pytest.param(
            kind, way, marks=() if (kind is kinds[0] and way != "run") or way == "eager" else pytest.mark.exhaustive
        )
        for kind in kinds
        for way in WAYS
    ]


@pytest.mark.parametrize(("kind", "way"), [*cases(Unit, UnitData, Clamped), (Rebound, "eager")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_under_adamw(kind: type[nn.Linear], way: str, dtype: torch.dtype | None) -> None:
    mine, reference = model(kind), model(kind)
    step = compiled(mine, loss_fn, lr=1e-2, compute_dtype=dtype, **WAYS[way])
    losses = [float(step(*batch)) for batch in batches(4)]
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    expected = []
    for batch in batches(4):
        optimizer.zero_grad()
        with contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype, cache_enabled=False):
            loss = loss_fn(reference, *batch)
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    # AdamW's own order of operations moves weights by their last bit, which may turn a rounding of bf16 (2 to the -9).
    assert losses == pytest.approx(expected, rel=1e-5 if dtype is None else 2**-8)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)


def schedule_free(reference: nn.Module, data: list[Any], loss: Any, lr: float, beta: float) -> None:
    """The authors' own optimizer, which makes z of the weights that the first forward left; the parameters end at x."""
    optimizer = schedulefree.SGDScheduleFree(reference.parameters(), lr=lr, momentum=beta)
    optimizer.train()
    for batch in data:
        optimizer.zero_grad()
        loss(reference, *batch).backward()
        optimizer.step()
    optimizer.eval()


@pytest.mark.parametrize(("kind", "way"), cases(Unit, Clamped))
def test_under_schedule_free(kind: type[nn.Linear], way: str) -> None:
    mine, reference = model(kind), model(kind)
    recipe = optim.schedule_free(optim.scale_by_learning_rate(0.05), lr=0.05, beta=0.9)
    step = compiled(mine, loss_fn, optimizer=recipe, **WAYS[way])
    for batch in batches(6):
        step(*batch)
    schedule_free(reference, batches(6), loss_fn, 0.05, 0.9)
    # Both lead y back to x by a division by 0.9: an error of a few ulps a step.
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", pytest.param("read", marks=pytest.mark.exhaustive)])
def test_an_embedding_with_a_norm_under_schedule_free(way: str) -> None:
    """``max_norm`` renormalizes the rows that a forward looks up, in place."""
    torch.manual_seed(3)
    mine = nn.Sequential(nn.Embedding(10, 8, max_norm=1.0, padding_idx=0), nn.Linear(8, 2))
    reference = deepcopy(mine)
    data = [(torch.randint(0, 10, (6,)), torch.randn(6, 2)) for _ in range(4)]
    recipe = optim.schedule_free(optim.scale_by_learning_rate(0.05), lr=0.05, beta=0.9)
    step = compiled(mine, loss_fn, optimizer=recipe, **WAYS[way])
    for batch in data:
        step(*batch)
    schedule_free(reference, data, loss_fn, 0.05, 0.9)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)


def test_at_the_first_step_what_is_written_is_the_start_but_not_of_what_a_warm_start_brought() -> None:
    recipe = optim.schedule_free(optim.scale_by_learning_rate(0.05), lr=0.05, beta=0.8)
    plan = compiled(model(Unit), loss_fn, optimizer=recipe, mode="eager")._programs._plan.update
    (bank,) = plan.layout.banks
    x = keys.params(bank.key)
    fresh = {x: torch.ones(bank.shape), keys.HYPERPARAMETERS: plan.hyperparameters.tensor}
    fresh |= plan.fresh(fresh)
    (z,) = (key for key in fresh if key.endswith(f"z/{bank.key}"))
    for moved in (0.0, 1.0):  # how far z went before
        state = {**fresh, z: fresh[z] + moved}
        context = plan.context(state)
        point = plan.gradient_point(state, context)
        written = {n: Written(seen, seen + 0.5) for n, seen in plan.layout.views(point).items()}
        for first in (torch.tensor(True), torch.tensor(False), None):
            after = with_written_point(plan, state, point, written, context, first)
            starts = first is not None and bool(first) and moved == 0.0
            for key, goes_on in ((z, 1.0 + moved), (x, 1.0 + 0.5 / 0.8)):
                wanted = torch.full((), 1.5 if starts else goes_on)
                for part in bank.split(after[key]):  # rounded from 0.8 x + 0.2 z and back
                    torch.testing.assert_close(part, wanted.expand(part.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "read"])
def test_with_accumulation_each_part_starts_from_what_the_one_before_wrote(way: str) -> None:
    class Shrinking(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.9)
            return F.linear(x, self.weight)

    mine, reference = model(Shrinking), model(Shrinking)
    step = compiled(mine, loss_fn, lr=1e-2, accumulate=2, **WAYS[way])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for x, y in batches(3):
        step(x, y)
        optimizer.zero_grad()
        for part in zip(x.chunk(2), y.chunk(2), strict=True):
            (loss_fn(reference, *part) / 2).backward()
        optimizer.step()
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["eager", "run"])
def test_half_precision_weights_take_the_write_into_their_master(way: str) -> None:
    """The ordinary loop with a master: the forward writes bf16, and the master follows where it is not the rounding."""
    mine = model(Unit).bfloat16()
    reference = deepcopy(mine)
    step = compiled(mine, loss_fn, optimizer=optim.adamw(1e-2, weight_decay=0.0), **WAYS[way])
    named = dict(reference.named_parameters())
    masters = {n: p.detach().float() for n, p in named.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, weight_decay=0.0)
    for batch in batches(4, dtype=torch.bfloat16):
        step(*batch)
        loss = F.mse_loss(reference(batch[0]).float(), batch[1])
        found = torch.autograd.grad(loss, list(named.values()))
        for (n, p), g in zip(named.items(), found, strict=True):
            written = masters[n].bfloat16() != p
            masters[n][written] = p.detach().float()[written]
            masters[n].grad = g.float()
        optimizer.step()
        with torch.no_grad():
            for n, p in named.items():
                p.copy_(masters[n])
    # One rounding of bf16 where the last bit of a master falls on another side.
    assert_same_weights(mine, reference, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("way", ["read", "run"])
def test_another_tensor_in_a_parameter_is_refused_where_a_capture_would_lose_it(way: str) -> None:
    step = compiled(model(Rebound), loss_fn, **WAYS[way])
    with pytest.raises(ValueError, match=r"puts another tensor into 1\.weight .* mode='eager'"):
        step(*batches(1)[0])


def test_a_skipped_step_takes_the_write_back() -> None:
    mine = model(Unit)
    before = {n: p.detach().clone() for n, p in mine.named_parameters()}
    step = compiled(mine, loss_fn, mode="eager")
    x, y = batches(1)[0]
    step(x * float("nan"), y)
    assert int(step.metrics["skipped"]) == 1
    assert all(torch.equal(p, before[n]) for n, p in mine.named_parameters())


def test_a_point_that_weights_do_not_lead_to_is_refused() -> None:
    def update(updates: Any, state: Any, params: Any, context: Any) -> Any:
        return {k: -0.1 * u for k, u in updates.items()}, state

    squared = Extras("squared", gradient_point=lambda p, s, c: {k: v * v for k, v in p.items()}, descends=True)
    mine = model(Unit)
    before = {n: p.detach().clone() for n, p in mine.named_parameters()}
    step = compiled(mine, loss_fn, optimizer=Transform(lambda params: EmptyState(), update, squared), mode="eager")
    with pytest.raises(ValueError, match=r"the forward writes 1\.weight, and squared differentiates at a point"):
        step(*batches(1)[0])
    assert all(torch.equal(p, before[n]) for n, p in mine.named_parameters())
