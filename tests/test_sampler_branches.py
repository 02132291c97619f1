"""Models whose Python code branches on what is in a tensor: each side has a program, and both are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc

X, TIMES = torch.linspace(-1, 1, 24).reshape(2, 3, 4), (1.0, 0.75, 0.5, 0.25)


def at(t: float) -> Tensor:
    return torch.full((2,), t)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out, self.time, self.text = nn.Linear(4, 4), nn.Linear(1, 4), nn.Linear(4, 4)


class NoImage(Base):
    """HunyuanVideo-1.5: an image embedding of zeros means text to video."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        shift = self.time(t[:, None, None])
        if torch.all(cond == 0):
            return self.out(x) + shift
        return self.out(x) * shift + self.text(cond)


class Lengths(Base):
    """Lumina2: the length of each text is read from its mask."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        longest = max(text_mask.sum(1).tolist())
        texts = text if longest == text.shape[1] else text[:, :longest]
        shifted: Tensor = self.out(x) * self.time(t[:, None, None]) + self.text(texts).mean(1, keepdim=True)
        return shifted


class Framepack(Base):
    """HunyuanVideo-Framepack cuts a concatenation where a mask says, and splits by such numbers."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        n = text_mask.sum(1, dtype=torch.int)
        both = torch.cat([self.text(text), self.out(x)], dim=1)
        seen, rest = both[:, : n[0]], both[:, n[0] :]
        first, _ = both.split([int(n[1]), both.shape[1] - int(n[1])], dim=1)
        ends: Tensor = seen.sum(1, keepdim=True) - rest.sum(1, keepdim=True) + first.mean(1, keepdim=True)
        return self.out(x) * self.time(t[:, None, None]) + ends


class Interval(Base):
    """stable-audio-tools: guidance within an interval of noise levels only."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        shifted: Tensor = self.out(x) + self.time(t[:, None, None])
        return shifted + self.text(cond) if 0.4 <= t[0] <= 0.8 else shifted


class Decoder(Base):
    """torch's decoder looks whether its mask, a buffer, is the causal one."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(4, 1, 8, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 1)
        self.register_buffer("mask", torch.triu(torch.full((3, 3), float("-inf")), 1))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Any:
        return self.decoder(tgt=x, memory=self.time(t[:, None, None]) + cond, tgt_mask=self.mask)


def made(kind: type[Base], **options: Any) -> tuple[Base, fc.Sampler]:
    model = kind().eval().requires_grad_(False)
    return model, fc.optimize_sampler(model, 4, mode="eager", **options)


def same(sampler: fc.Sampler, model: nn.Module, *request: Tensor) -> bool:
    return all(torch.equal(sampler(X, at(t), *request), model(X, at(t), *request)) for t in TIMES)


def test_a_branch_on_the_request_has_a_program_for_each_side() -> None:
    model, sampler = made(NoImage)
    zeros, image, other = torch.zeros(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for request in (zeros, image, zeros.clone(), other, zeros):
        assert same(sampler, model, request)
    assert len(sampler.report.programs) == 2
    assert sampler.release_weights(to="drop") > 0
    assert sampler(X, at(0.5), zeros).shape == X.shape


def test_lengths_that_are_read_from_a_mask() -> None:
    model, sampler = made(Lengths)
    text = torch.randn(2, 5, 4)
    for lengths in ((5, 3), (4, 4), (5, 3)):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        assert same(sampler, model, text, mask)
    assert len(sampler.report.programs) == 2


def test_a_concatenation_that_is_cut_at_a_tensor() -> None:
    """Our own pass took the node of the bound for a number."""
    model, sampler = made(Framepack)
    text = torch.randn(2, 5, 4)
    for lengths in ((5, 3), (4, 2), (2, 5)):
        mask = torch.arange(5) < torch.tensor(lengths)[:, None]
        assert same(sampler, model, text, mask)


def test_a_branch_on_the_timestep_is_taken_by_value() -> None:
    model, sampler = made(Interval)
    cond = torch.randn(2, 3, 4)
    assert same(sampler, model, cond) and same(sampler, model, cond + 1)
    assert len(sampler.report.programs) == 3  # below, within and above


def test_a_mask_that_torch_inspects_is_a_constant_until_it_changes() -> None:
    model, sampler = made(Decoder)
    cond = torch.randn(2, 1, 4)
    assert same(sampler, model, cond) and len(sampler.report.programs) == 1
    mask: Any = model.mask
    mask.zero_()
    assert same(sampler, model, cond)


@pytest.mark.parametrize("how", ["in place", "without a version", "replaced", "loaded"])
def test_a_weight_that_decides_is_followed(how: str) -> None:
    class Gated(NoImage):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            scale = self.time(t[:, None, None])
            return self.out(x) + scale if self.gate.item() == 0 else self.out(x) * scale + self.text(cond)

    model, sampler = made(Gated)
    cond = torch.randn(2, 3, 4)
    for value in (0.0, 1.0, 0.0):
        gate: Any = model.gate
        if how == "in place":
            gate.fill_(value)
        elif how == "without a version":
            gate.data.fill_(value)
        elif how == "replaced":
            model.gate = nn.Parameter(torch.full((1,), value), requires_grad=False)
        else:
            model.load_state_dict({**model.state_dict(), "gate": torch.full((1,), value)})
        assert same(sampler, model, cond)
    assert sampler.release_weights(to="drop") > 0 and model.get_parameter("gate").numel() == 1


@pytest.mark.filterwarnings("ignore:the sampler was called with more than 4")
def test_values_beyond_a_bound_are_served_by_the_whole_model_with_a_sentence(recwarn: Any) -> None:
    model, sampler = made(Lengths)
    text = torch.randn(2, 12, 4)
    for n in range(1, 11):
        mask = torch.arange(12) < torch.tensor([n, 1])[:, None]
        assert torch.equal(sampler(X, at(0.5), text, mask), model(X, at(0.5), text, mask))
    said = [str(w.message) for w in recwarn if "there were 8 values so far" in str(w.message)]
    assert len(said) == 1 and f"Lengths reads a value from a tensor at {__file__}:" in said[0]


def test_a_number_of_the_timestep_is_given_up_soon() -> None:
    class Logarithm(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            import math

            scaled: Tensor = self.out(x) * math.log(1 + t[0].item())
            return scaled

    model, sampler = made(Logarithm)
    with pytest.warns(UserWarning, match="there were 2 values so far"):
        assert same(sampler, model)


def test_a_branch_on_the_latent_is_left_to_the_model_and_prints_no_graph(capfd: pytest.CaptureFixture[str]) -> None:
    """HiDream's experts count their tokens on the host."""

    class OnLatent(Base):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x + t[:, None, None] if x.sum() > 0 else x - t[:, None, None]

    model, sampler = made(OnLatent)
    with pytest.raises(ValueError, match=r"OnLatent reads the contents .* and x decides it"):
        sampler.prepare((X, at(0.5)))
    with pytest.warns(UserWarning, match=r"x decides it, .*Meanwhile the whole model serves"):
        assert same(sampler, model)
    assert torch.equal(sampler(-X - 1, at(0.5)), model(-X - 1, at(0.5)))
    exports = sampler._programs._graphs.n_exports
    sampler(X, at(0.5))
    assert sampler._programs._graphs.n_exports == exports, "it was traced again"
    assert capfd.readouterr() == ("", "")


def test_the_models_own_state_is_as_it_was_after_it_was_read() -> None:
    class Counts(NoImage):
        calls = 0

        def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(x, t, cond)

    model, sampler = made(Counts)
    vars(model)["calls"] = 7
    sampler(X, at(0.5), torch.zeros(2, 3, 4))
    assert vars(model)["calls"] == 7
