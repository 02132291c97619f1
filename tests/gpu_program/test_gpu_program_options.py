"""What a step can be asked for besides a recipe, the torch optimizer and periodic work, as a GPU would run them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dit import DiT
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusion_compile as fc
from fusion_compile import optim
from fusion_compile._gpu_program.generated import Generated
from fusion_compile._program.program import Program
from tests.gpu_program.generated_programs import Row, batch_inputs, table, written, wrong_with
from tests.gpu_program.programs import batch, drawn_loss, step_programs

pytestmark = [pytest.mark.cuda_codegen, pytest.mark.timeout(3600)]


def good(key: str, program: Program, *, recorded: bool = True, batch: list[str] | None = None) -> Generated:
    """The written program, after nothing was found wrong with it. `batch`: by default the step's."""
    mode = "max-autotune" if recorded else "max-autotune-no-cudagraphs"
    found = written(key, program, mode=mode)
    wrong = wrong_with(found, batch=batch_inputs(program) if batch is None else batch, recorded=recorded)
    assert not wrong, "\n".join(wrong)
    return found


class Checkpointed(nn.Module):
    """A DiT whose blocks are computed again in the backward."""

    def __init__(self, model: DiT) -> None:
        super().__init__()
        self.model = model
        for at, block in enumerate(model.blocks):
            model.blocks[at] = _Again(block)

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.model(*inputs)
        return out


class _Again(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.block, *inputs, use_reentrant=False)
        return out


def small_dit() -> DiT:
    return DiT(input_size=8, hidden_size=128, depth=1)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "accumulate": ("sf_normuon", {"accumulate": 2}),
    "clip": ("adamw", {"clip_grad_norm": 1.0}),
    "no skip": ("adamw", {"skip_nonfinite": False}),
    "compute_dtype": ("muon", {"compute_dtype": torch.bfloat16}),
    "captured by running": ("adamw", {"capture": "run"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_with_an_option(option: str) -> None:
    recipe, given = OPTIONS[option]
    _, (program,) = step_programs(recipe, depth=1, **given)
    found = good(option, program)
    if option == "compute_dtype":
        products = [line for line in found.codes[0].splitlines() if "torch.bfloat16" in line]
        assert len(products) > 20, "the products' inputs are bf16"


def test_checkpointing() -> None:
    torch.manual_seed(0)
    _, (program,) = step_programs("adamw", model=Checkpointed(small_dit()))
    found, program_without = good("checkpointing", program), step_programs("adamw", depth=1)[1][0]
    without = good("no checkpointing", program_without)
    assert len(found.launches) > len(without.launches), "what is recomputed is computed again"


def test_half_precision_weights() -> None:
    """Masters in fp32; the weights that the loss reads are written in bf16."""
    model = nn.Sequential(nn.Linear(128, 256), nn.SiLU(), nn.Linear(256, 128, bias=False)).bfloat16()
    step = fc.compile_training_step(
        model, lambda model, x: model(x).float().square().mean(), optimizer="muon", backend="eager"
    )
    step(torch.ones(8, 128, dtype=torch.bfloat16))
    (program,) = step.programs
    found = good("half-precision weights", program)
    assert "torch.bfloat16" in found.codes[0]


def test_a_step_size_from_the_loss_and_sums_over_banks() -> None:
    """It is stored and decides what else is stored, which Triton 3.7 could not compile on this model."""
    _, (program,) = step_programs(optim.scale_lr_by_loss_ratio(optim.muon()), depth=1)
    good("scale_lr_by_loss_ratio", program)


SUMMING = {
    "autoscale": lambda: optim.autoscale(optim.muon()),
    "schedule_free_plus": lambda: optim.schedule_free_plus(optim.scale_by_learning_rate(1.0)),
    "cautious": lambda: optim.chain(optim.cautious(optim.scale_by_adam()), optim.scale_by_learning_rate(1e-3)),
    "fusionopt_compat": optim.fusionopt_compat,
}
"""Numbers from sums over all banks, and index tables that a CUDA graph must not copy."""


@pytest.mark.parametrize("name", SUMMING)
def test_sums_over_banks(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 192), nn.SiLU(), nn.Linear(192, 64, bias=False))
    step = fc.compile_training_step(
        model, lambda model, x: model(x).square().mean(), optimizer=SUMMING[name](), backend="eager"
    )
    for _ in range(2):
        step(torch.ones(8, 64))
    for i, program in enumerate(step.programs):
        good(f"{name} {i}", program)


def test_periodic_work_is_a_program_of_its_own_without_a_cuda_graph() -> None:
    step, _ = step_programs(optim.soap(every=2), depth=1, steps=3)
    assert step.periodic_programs
    for name, program in step.periodic_programs.items():
        good(f"soap: {name}", program, recorded=False)


def test_the_torch_optimizers_update() -> None:
    """Gradients come from ever new addresses and are copied into the graph's; all else is updated in place."""
    rows = []
    for recipe in ("adamw", "sf_normuon"):
        torch.manual_seed(0)
        model = small_dit()
        optimizer = fc.optim.as_torch_optimizer(model, recipe, backend="eager")
        drawn_loss(model, *batch()).backward()
        optimizer.step()
        (program,) = optimizer._inside.programs._programs.captured.values()
        gradients = [name for name, said in program.input_names.items() if not said.startswith("state/")]
        rows.append(Row(recipe, good(f"torch optimizer: {recipe}", program, batch=gradients)))
    assert_expected_inline(
        table(rows),
        """\
                    forward   backward  optimizer      state    all
adamw                0 + 0      0 + 0      0 + 0      0 + 3       3
sf_normuon           0 + 0      0 + 0      0 + 0    123 + 24    147
""",
    )
