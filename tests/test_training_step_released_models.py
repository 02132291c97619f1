"""Released models, tiny, train as in the ordinary loop: losses and weights, whichever way the step is captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusion_compile as fc
from tests.models.released import DROPOUT, READS_THE_HOST, RELEASED, Released
from tests.small_models import torch_loop

EPS = 1e-4
"""Adam's, far above the rounding of a gradient that is zero (a key's bias in softmax), which 1e-8 makes steps of."""
QUIET = (
    "ignore:the step is captured by running",
    "ignore:`gradient_checkpointing_enable`",
    "ignore:Dynamo detected a call to a `functools.lru_cache`",
    "ignore:TorchaoLoraLinear was instantiated without",
    "ignore:this step ran uncaptured, because .*cached_rotary",
)
"""What the libraries' own code makes torch, transformers and the step say."""


def _made(name: str, dropout: float) -> Released:
    torch.manual_seed(0)
    released = (RELEASED | READS_THE_HOST)[name](dropout)
    torch.manual_seed(1)
    return released


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def _ordinary_loop(name: str, dropout: float) -> tuple[list[Tensor], dict[str, Tensor]]:
    model, loss_fn, batches = _made(name, dropout)
    losses = torch_loop(model, batches, loss_fn, lr=1e-3, eps=EPS)
    return losses, _weights(model)


def _agrees(name: str, dropout: float, **options: Any) -> fc.TrainingStep:
    losses, weights = _ordinary_loop(name, dropout)
    model, loss_fn, batches = _made(name, dropout)
    step = fc.compile_training_step(model, loss_fn, optimizer=fc.optim.adamw(1e-3, eps=EPS), **options)
    got = torch.stack([step(*batch).clone() for batch in batches])
    # fp32 sums of another order: 6 steps of lr 1e-3 carry a gradient's rounding of 1e-6 into the weights.
    torch.testing.assert_close(got, torch.stack(losses), rtol=1e-5, atol=1e-6)
    for parameter, value in _weights(step.model).items():
        torch.testing.assert_close(value, weights[parameter], rtol=1e-4, atol=2e-6, msg=parameter)
    return step


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("capture", [None, "run"])
@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.covering("Llama, checkpointed-None", "GPT-2-run", "4-bit base with LoRA", "LSTM")
def test_losses_and_weights_are_the_ordinary_loops(name: str, capture: Any) -> None:
    """With dropout, also inside checkpointed layers: the masks are the loop's, bit for bit, or the loss is another."""
    step = _agrees(name, DROPOUT, capture=capture, backend="aot_eager")
    assert len(step.programs) == 1
    if capture == "run":
        assert step.programs[0].captured_by == "run"


@pytest.mark.exhaustive
@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("capture", [None, "run"])
@pytest.mark.parametrize("name", ["GPT-2", "Llama, checkpointed", "Mixtral"])
def test_inductor_trains_them_too(name: str, capture: Any) -> None:
    _agrees(name, 0.0, capture=capture)


@pytest.mark.parametrize("capture", [None, "run"])
@pytest.mark.parametrize(
    ("name", "line"), [("Whisper", "dropout_probability < self.layerdrop"), ("Wav2Vec2", "if not skip_the_layer")]
)
@pytest.mark.covering("None")
def test_layers_dropped_on_the_host_are_refused_with_the_line(name: str, line: str, capture: Any) -> None:
    model, loss_fn, batches = _made(name, DROPOUT)
    before = _weights(model)
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", capture=capture, backend="aot_eager")
    with pytest.raises(ValueError, match=f"(?s)modeling_.*{line}.*reads a tensor's value on the host"):
        step(*batches[0])
    assert all(torch.equal(value, before[parameter]) for parameter, value in _weights(model).items())


def test_a_mixture_of_experts_in_fp32_is_read() -> None:
    """Its grouped matrix product has a kernel for fp32; torch's shape function knows bf16 alone."""
    model, loss_fn, batches = _made("Mixtral", 0.0)
    step = fc.compile_training_step(model, loss_fn, optimizer="adamw", backend="aot_eager")
    step(*batches[0])
    assert step.programs[0].captured_by == "read"
    assert step.programs[0].findings(thorough=True) == ()
