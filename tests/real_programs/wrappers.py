"""Rows: models inside of something else."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from tests.models.released import RELEASED
from tests.real_programs.program import Program, Sampling, Training
from tests.small_models import batches, mlp, squared_error

Wrap = Callable[[nn.Module], nn.Module]


class Modulated(nn.Module):
    """A denoiser of a few layers: ``net.0``, ``net.2`` and ``time``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.time = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4)), nn.Linear(1, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x) * self.time(t[:, None])


def _denoiser_loss(model: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    return F.mse_loss(model(x, t), x)


def _pairs(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 4), torch.rand(8)) for _ in range(count)]


def _wrapped(wrap: Wrap) -> Program:
    def train() -> Training:
        return Training(wrap(Modulated()), _denoiser_loss, [*_pairs(3)])

    def sample() -> Sampling:
        model = wrap(Modulated()).eval().requires_grad_(False)
        times = [torch.full((8,), t) for t in (0.9, 0.5, 0.1)]
        return Sampling(model, [{"x": torch.randn(8, 4), "t": t} for t in times])

    return Program(train, sample)


def _peft(**config: Any) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        import peft

        kind = getattr(peft, config.get("kind", "LoraConfig"))
        given = {k: v for k, v in config.items() if k != "kind"}
        return peft.inject_adapter_in_model(kind(target_modules=["net.0", "net.2", "time"], **given), model)

    return wrap


def _language_adapter() -> Training:
    """peft's own wrapper around a language model: ``get_peft_model``."""
    import peft

    model, _, data = RELEASED["GPT-2"](0.0)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    return Training(adapted.train(), loss_fn, list(data[:3]))


def _compiled_part(model: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(model.get_submodule("net"), backend="aot_eager")
    model.add_module("net", compiled)
    return model


def _compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def _distributed(model: nn.Module) -> nn.Module:
    import torch.distributed as dist

    if not dist.is_initialized():
        place = tempfile.mkdtemp()
        dist.init_process_group("gloo", init_method=f"file://{place}/rendezvous", rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


def _checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.add_module("net", checkpoint_wrapper(model.get_submodule("net")))
    return model


def _parametrized(by: Callable[[nn.Module], nn.Module]) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        by(model.get_submodule("net.0"))
        return model

    return wrap


class _Inside(nn.Module):
    """A wrapper of one's own, with the model under another name."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x, t=t)


def _scripted() -> Training:
    return Training(torch.jit.script(Modulated()), _denoiser_loss, [*_pairs(3)])


def _functional() -> Training:
    """The loss calls the model with its weights scaled."""

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        scaled = {name: 0.9 * p for name, p in model.named_parameters()}
        return F.mse_loss(functional_call(model, scaled, (x,)), y)

    return Training(mlp(), loss_fn, [*batches(3)])


def _with_teacher() -> Training:
    """An average of the weights as a teacher in the loss, updated there, as in self-distillation."""
    model = mlp()
    teacher = copy.deepcopy(model).requires_grad_(False)

    def loss_fn(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            for kept, now in zip(teacher.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 0.1)
            goal = teacher(x)
        return F.mse_loss(model(x), y) + F.mse_loss(model(x), goal)

    return Training(model, loss_fn, [*batches(3)])


def _frozen_part() -> Training:
    model = mlp()
    model[0].requires_grad_(False)
    return Training(model, squared_error, [*batches(3)])


def _tied() -> Training:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[0].weight
    return Training(model, squared_error, [*batches(3)])


_RANK = {"r": 2, "init_lora_weights": False}
PROGRAMS: dict[str, Program] = {
    "peft LoRA": _wrapped(_peft(**_RANK)),
    "peft DoRA": _wrapped(_peft(**_RANK, use_dora=True)),
    "peft rsLoRA with dropout": _wrapped(_peft(**_RANK, use_rslora=True, lora_dropout=0.1)),
    "peft LoHa": _wrapped(_peft(kind="LoHaConfig", r=2, init_weights=False)),
    "peft LoKr": _wrapped(_peft(kind="LoKrConfig", r=2, init_weights=False)),
    "peft IA3": _wrapped(_peft(kind="IA3Config", feedforward_modules=[], init_ia3_weights=False)),
    "peft get_peft_model of a language model": Program(_language_adapter),
    "torch.compile of a submodule": _wrapped(_compiled_part),
    "torch.compile of the model": _wrapped(_compiled),
    "model.compile()": _wrapped(_compiled_in_place),
    "DataParallel on a CPU": _wrapped(lambda model: nn.DataParallel(model)),
    "DistributedDataParallel, one process": _wrapped(_distributed),
    "checkpoint_wrapper": _wrapped(_checkpointed),
    "weight_norm": _wrapped(_parametrized(parametrizations.weight_norm)),
    "weight_norm, the old one": _wrapped(_parametrized(torch.nn.utils.weight_norm)),
    "spectral_norm": _wrapped(_parametrized(parametrizations.spectral_norm)),
    "orthogonal": _wrapped(_parametrized(lambda m: parametrizations.orthogonal(m, orthogonal_map="cayley"))),
    "torch.jit.script": Program(_scripted, without=("explain",)),
    "a module around the model": _wrapped(_Inside),
    "functional_call in the loss": Program(_functional),
    "an averaged teacher in the loss": Program(_with_teacher),
    "frozen layers": Program(_frozen_part),
    "tied weights": Program(_tied),
}
