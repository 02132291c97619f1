"""Parameters that the loss reads in some steps only: refused, or as in the ordinary loop with `leave_unread`."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._state.banks import Bank
from fusion_compile._step.unread import where_read
from fusion_compile.optim._transform import Place

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("the step is captured by running it", r"batch\[2\] is another one", "the loss never reads heads")
]

EPS = 1e-3  # with less, the first updates are signs, and rounding errors decide them


class Turns(nn.Module):
    """A trunk and two heads; which one is read, a name, a count, a warm-up or a coin on the host decides."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.calls, self.trunk = by, 0, nn.Linear(4, 5)
        self.heads = nn.ModuleDict({"a": nn.Linear(5, 2), "b": nn.Linear(5, 2)})

    def forward(self, x: Tensor, name: str) -> Tensor:
        self.calls += self.by in ("count", "warm-up")
        h = torch.tanh(self.trunk(x))
        if self.by == "coin":
            return sum((head(h) for head in self.heads.values() if torch.rand(()) > 0.4), h[:, :2])
        if self.by == "warm-up":
            return self.heads["a"](h) + (self.heads["b"](h) if self.calls > 3 else 0)
        out: Tensor = self.heads[name if self.by == "name" else "ba"[self.calls % 2]](h)
        return out


def loss_fn(model: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    return F.mse_loss(model(x, name), y)


def batches() -> list[Any]:
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(6, 4, generator=g), torch.randn(6, 2, generator=g), "aab"[i % 3]) for i in range(8)]


def left(**more: Any) -> optim.Transform:
    return optim.leave_unread(optim.adamw(1e-2, eps=EPS, weight_decay=0.1, **more))


CASES = ["name None", "name read", "name accumulate", "count run", "warm-up run", "warm-up eager", "coin eager"]


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_ordinary_loop(case: str) -> None:
    by, way = case.split()
    torch.manual_seed(0)
    model = Turns(by)
    theirs = copy.deepcopy(model)
    parts = 2 if way == "accumulate" else 1
    own: dict[str, Any] = {"mode": "eager"} if way in ("eager", "accumulate") else {"backend": "aot_eager"}
    own |= {"capture": way} if way in ("run", "read") else {}
    step = fc.compile_training_step(model, loss_fn, optimizer=left(), accumulate=parts, **own)
    torch.manual_seed(5)
    found = [step(*batch) for batch in batches()]
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, eps=EPS, weight_decay=0.1)
    torch.manual_seed(5)
    for loss, (x, y, name) in zip(found, batches(), strict=True):
        adamw.zero_grad()
        losses = [loss_fn(theirs, *part, name) / parts for part in zip(x.chunk(parts), y.chunk(parts), strict=True)]
        for each in losses:
            each.backward()
        adamw.step()
        torch.testing.assert_close(loss, sum(each.detach() for each in losses), rtol=1e-5, atol=1e-6)
    for (n, p), q in zip(model.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=n)


def apart(models: nn.ModuleDict, batch: Tensor, name: str) -> Tensor:
    return models[name](batch).square().mean()


RECIPES = {
    "adamw": lambda: optim.adamw(1e-2),
    "lion": lambda: optim.lion(1e-3),
    "sf_adamw": lambda: optim.sf_adamw(1e-2),
    "adabelief": lambda: optim.adabelief(1e-2),
    "muon": lambda: optim.muon(1e-2),
    "sf_normuon": lambda: optim.sf_normuon(1e-2),
    "adamw in groups": lambda: optim.adamw(1e-2),
}


@pytest.mark.parametrize("name", RECIPES)
def test_parts_in_turn_are_trained_as_if_each_were_alone(name: str) -> None:
    torch.manual_seed(0)
    models = nn.ModuleDict({n: nn.Sequential(nn.Linear(4, 24), nn.Linear(24, 24), nn.Linear(24, 3)) for n in "ab"})
    alone = {n: nn.ModuleDict({n: copy.deepcopy(models[n])}) for n in "ab"}
    more: dict[str, Any] = {"mode": "eager", "skip_nonfinite": False}
    if "groups" in name:
        more["groups"] = [{"params": ["bias"], "weight_decay": 0.0, "name": "biases"}]
    step = fc.compile_training_step(models, apart, optimizer=optim.leave_unread(RECIPES[name]()), **more)
    each = {n: fc.compile_training_step(m, apart, optimizer=RECIPES[name](), **more) for n, m in alone.items()}
    for turn in "aababbbaab":
        x = torch.randn(8, 4)
        torch.testing.assert_close(step(x, turn), each[turn](x, turn), rtol=1e-5, atol=1e-7)
    for n in "ab":
        for (key, p), q in zip(models[n].named_parameters(), alone[n][n].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=f"{n}.{key}")


def test_an_average_moves_where_the_weight_stays() -> None:
    torch.manual_seed(0)
    models = nn.ModuleDict({n: nn.Linear(4, 2) for n in "ab"})
    ema = fc.EMA(models, 0.9)
    wanted = {n: p.detach().clone() for n, p in models.named_parameters()}
    step = fc.compile_training_step(models, apart, optimizer=left(), ema=ema, mode="eager")
    for turn in "abba":
        step(torch.randn(3, 4), turn)
        wanted = {n: wanted[n].lerp(p.detach(), 0.1) for n, p in models.named_parameters()}
    for n, p in ema.model.named_parameters():
        torch.testing.assert_close(p, wanted[n], msg=n)


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Any) -> None:
    def new() -> Any:
        torch.manual_seed(0)
        return fc.compile_training_step(Turns("name"), loss_fn, optimizer=left(), mode="eager")

    whole, first, second = new(), new(), new()
    wanted = [whole(*batch) for batch in batches()]
    for batch in batches()[:4]:
        first(*batch)
    first.save(tmp_path / "step.ckpt")
    second.load(tmp_path / "step.ckpt")
    assert [float(second(*batch)) for batch in batches()[4:]] == [float(loss) for loss in wanted[4:]]


def test_a_skipped_step_counts_for_no_parameter() -> None:
    torch.manual_seed(0)
    model = Turns("name")
    step = fc.compile_training_step(model, loss_fn, optimizer=left(), mode="eager")
    for x, y, name in batches()[:3]:
        step(x, y, name)
    skipped = int(step.metrics["skipped"])
    x, y, name = batches()[3]
    kept = [p.clone() for p in model.parameters()]
    step(x * float("nan"), y, name)
    assert int(step.metrics["skipped"]) == skipped + 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept, strict=True))


def test_without_it_the_sentence_names_it() -> None:
    torch.manual_seed(0)
    step = fc.compile_training_step(Turns("name"), loss_fn, optimizer="adamw", mode="eager")
    step(*batches()[0])
    with pytest.raises(ValueError, match=r"heads\.a.*leave_unread"):
        step(*batches()[2])


def test_what_it_does_not_go_with_is_said() -> None:
    given: dict[str, Any] = {"optimizer": left(), "mode": "eager"}
    with pytest.raises(ValueError, match="keep_gradients"):
        fc.compile_training_step(Turns("name"), loss_fn, keep_gradients=True, **given)


def test_a_choice_follows_the_places_of_a_bank() -> None:
    places = (Place("a", (3,), 0), Place("b", (2, 2), 4), Place("c", (1,), 8))
    flat = Bank("scalar/float32", torch.float32, None, places, 12)
    chosen = where_read(flat, torch.ones(12), torch.zeros(12), {"b"})
    assert chosen.tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 4
    assert where_read(flat, torch.ones(3), torch.zeros(3), {"a"}).tolist() == [0.0, 1.0, 1.0]  # one for each four
    old = torch.zeros(12)
    assert where_read(flat, torch.ones(12), old, {"a", "b", "c"}) is old
