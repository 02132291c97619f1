"""`accumulate`: what is cut, how much each part counts, and that the step is the ordinary loop's over the parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusion_compile as fc
from fusion_compile._step.micro_batches import Shares, leading_size, micro_batches, uncut
from tests.small_models import assert_same_weights, batches, compiled, mlp, squared_error

WAYS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "read": {"backend": "aot_eager", "capture": "read"},
    "run": {"backend": "aot_eager", "capture": "run"},
}
SOME = [pytest.param(way, marks=() if way != "run" else pytest.mark.exhaustive, id=way) for way in WAYS]


# -- what is cut -------------------------------------------------------------------------------------------------------


def test_parts_are_as_equal_as_can_be_and_everything_else_goes_whole() -> None:
    x, table, scale = torch.arange(20).view(10, 2), torch.arange(1000), torch.tensor(2.0)
    parts = micro_batches(({"x": x, "t": x[:, 0]}, table, scale, True), 4)
    assert [part.size for part in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([part.batch[0]["x"] for part in parts]), x)
    assert torch.equal(torch.cat([part.batch[0]["t"] for part in parts]), x[:, 0])
    assert all(part.batch[1] is table and part.batch[2] is scale and part.batch[3] is True for part in parts)
    assert "leading size, 10; batch[1] [1000] goes whole" in uncut(({"x": x, "t": x[:, 0]}, table, scale))
    assert uncut((x, scale)) == ""


def test_the_batchs_size_is_the_one_that_most_tensors_share_and_of_several_the_first() -> None:
    assert leading_size((torch.zeros(1000), torch.zeros(8, 2), torch.zeros(8))) == 8
    assert leading_size((torch.zeros(8, 2), torch.zeros(1000))) == 8
    with pytest.raises(ValueError, match="no tensor of the batch has one"):
        leading_size((torch.zeros(()), None))


def test_a_small_batch_has_fewer_parts_and_one_part_is_the_batch() -> None:
    x = torch.zeros(3, 2)
    assert [part.size for part in micro_batches((x,), 8)] == [1, 1, 1]
    (whole,) = micro_batches((x,), 1)
    assert whole.batch[0] is x


# -- how much each counts ----------------------------------------------------------------------------------------------


def test_shares() -> None:
    equal, uneven, counted = Shares((4, 4)), Shares((3, 3, 2)), Shares((4, 4), "tokens")
    assert [equal.weight(i, {}) for i in range(2)] == [1, 1] and equal.total([1, 1]) == equal.known_total() == 2
    assert [uneven.weight(i, {}) for i in range(3)] == [3, 3, 2] and uneven.known_total() == 8
    assert counted.known_total() is None and Shares((4,), "tokens").known_total() == 1
    found = [{"tokens": torch.tensor(n), "loss": torch.tensor(v)} for n, v in ((6, 1.0), (2, 5.0))]
    weights = [counted.weight(i, found[i]) for i in range(2)]
    mean = counted.mean(found, weights, torch.float32)
    assert (int(mean["tokens"]), float(mean["loss"])) == (8, 2.0) and mean["tokens"].dtype == torch.int64
    with pytest.raises(ValueError, match=r"weigh_by='tokens' .* the loss returned only \['loss'\]"):
        counted.weight(0, {"loss": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"a 0-dim count, and the loss returned \[2\]"):
        counted.weight(0, {"tokens": torch.zeros(2)})


def test_metrics_of_different_shapes_have_no_mean() -> None:
    with pytest.raises(ValueError, match=r"'each' is \[3\] in the first micro-batch and \[1\] in another"):
        Shares((3, 1)).mean([{"each": torch.zeros(3)}, {"each": torch.zeros(1)}], [3, 1], torch.float32)


# -- the step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", SOME)
def test_a_batch_that_does_not_divide_is_one_big_batch(way: str) -> None:
    """A drop_last=False loader ends with 5 of 8; mean losses over 2, 2 and 1 rows are weighed by the rows."""
    mine, reference = mlp(), mlp()
    step = compiled(mine, lr=1e-2, accumulate=3, **WAYS[way])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for x, y in [*batches(2, 6), *batches(1, 5), *batches(1, 2)]:
        loss = step(x, y)
        optimizer.zero_grad()
        wanted = squared_error(reference, x, y)
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-5, atol=0)  # fp32 sums in parts
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", SOME)
def test_a_table_beside_the_batch_goes_whole_and_integers_are_averaged_as_numbers(way: str) -> None:
    def loss(m: nn.Module, x: Tensor, table: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = {"rows": torch.tensor(len(table)), "positive": (x[:, 0] > 0).sum(), "any": (x[:, 0] > 2).any()}
        return m(x).square().mean() * table.sum(), found

    step = compiled(mlp(), loss, accumulate=4, **WAYS[way])
    x = torch.zeros(8, 4)
    x[:3, 0] = 1.0
    with pytest.warns(UserWarning, match=r"leading size, 8; batch\[1\] \[1000\] goes whole into every micro-batch"):
        step(x, torch.linspace(1, 0, 1000))
    assert float(step.metrics["rows"]) == 1000
    assert float(step.metrics["positive"]) == 0.75  # 2, 1, 0 and 0 of two rows each
    assert float(step.metrics["any"]) == 0.0


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(tokens))
        return out


def masked_loss(m: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    loss = F.cross_entropy(m(tokens).flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, {"tokens": (labels != -100).sum()}


@pytest.mark.parametrize("way", SOME)
def test_micro_batches_weighed_by_tokens_are_one_big_batch(way: str) -> None:
    """The mean over all tokens, as in a loop that divides each sum by the count of the whole batch."""
    torch.manual_seed(0)
    mine, reference = Tagger(), Tagger()
    reference.load_state_dict(mine.state_dict())
    step = compiled(mine, masked_loss, lr=1e-2, accumulate=2, weigh_by="tokens", **WAYS[way])
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for _ in range(3):
        tokens, labels = torch.randint(0, 7, (4, 5)), torch.randint(0, 7, (4, 5))
        labels[:2, 1:] = -100  # 2 tokens in the first half, 10 in the second
        loss = step(tokens, labels)
        optimizer.zero_grad()
        total = (labels != -100).sum()
        losses = []
        for part in (slice(0, 2), slice(2, 4)):
            summed = F.cross_entropy(
                reference(tokens[part]).flatten(0, 1), labels[part].flatten(), ignore_index=-100, reduction="sum"
            )
            (summed / total).backward()
            losses.append(summed.detach())
        optimizer.step()
        assert int(step.metrics["tokens"]) == 12
        torch.testing.assert_close(loss, sum(losses) / total, rtol=1e-5, atol=0)  # fp32 sums in another order
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


def test_gradient_hooks_see_the_ordinary_loops_gradients_in_uneven_parts() -> None:
    seen: dict[str, list[float]] = {"mine": [], "loop": []}
    mine, reference = mlp(), mlp()

    def watch(model: nn.Module, name: str) -> None:
        def hook(gradient: Tensor) -> Tensor:
            seen[name].append(float(gradient.abs().sum()))
            return gradient.clamp(-0.01, 0.01)

        model.get_parameter("0.weight").register_hook(hook)

    watch(mine, "mine")
    watch(reference, "loop")
    step = compiled(mine, lr=1e-2, accumulate=2, mode="eager", rehearse=False)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    x, y = batches(1, 5)[0]
    step(x, y)
    seen["mine"] = seen["mine"][-2:]  # the examination on tensors without data calls no hook; nothing else did
    for part in (slice(0, 3), slice(3, 5)):
        (squared_error(reference, x[part], y[part]) * (part.stop - part.start) / 5).backward()
    optimizer.step()
    assert seen["mine"] == pytest.approx(seen["loop"], rel=1e-5)
    assert_same_weights(mine, reference, rtol=1e-4, atol=1e-6)


def test_what_has_no_answer_is_refused_and_changes_nothing() -> None:
    model = Tagger()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step = compiled(model, masked_loss, accumulate=2, weigh_by="words", mode="eager")
    tokens = torch.randint(0, 7, (4, 5))
    with pytest.raises(ValueError, match=r"weigh_by='words' names a metric .* only \['tokens'\]"):
        step(tokens, tokens)
    hooked = compiled(Tagger(), masked_loss, accumulate=2, weigh_by="tokens", mode="eager")
    hooked.model.get_parameter("embed.weight").register_hook(lambda g: g)
    with pytest.raises(ValueError, match="weigh_by='tokens' with gradient hooks"):
        hooked(tokens, tokens)
    with pytest.raises(TypeError, match="weigh_by=3 is not a name"):
        fc.compile_training_step(Tagger(), masked_loss, optimizer="adamw", weigh_by=3)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
