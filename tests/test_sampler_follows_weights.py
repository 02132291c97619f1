"""Whatever changes a model's weights or its structure, the next call is right, and no more is computed than must be."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fusion_compile.sampler import Sampler, optimize_sampler
from tests.small_denoiser import NULL, Counter, Denoiser, X, Y, denoiser, exactly, trusted

TIMES = (8.0, 7.0, 6.0)


def served(sampler: Sampler) -> bool:
    """A trajectory over TIMES for two requests is bitwise the model's."""
    return all(exactly(sampler, t, y) for t in TIMES for y in (Y, NULL))


def warm(model: nn.Module | None = None, **options: object) -> Sampler:
    sampler = optimize_sampler(model or denoiser(), 3, mode="eager", **options)  # type: ignore[arg-type]
    assert served(sampler)
    return sampler


def model_of(sampler: Sampler) -> Denoiser:
    assert isinstance(sampler.model, Denoiser)
    return sampler.model


def _load_into_a_child(model: Denoiser) -> None:
    model.time.load_state_dict({k: v + 1 for k, v in model.time.state_dict().items()})


def _assign(model: Denoiser) -> None:
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True)


def _foreach(model: Denoiser) -> None:
    with torch.no_grad():
        torch._foreach_mul_([p for n, p in model.named_parameters() if not n.startswith("out")], 1.5)


def _vector(model: Denoiser) -> None:
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in model.parameters())), model.parameters())


def _other_parameters(model: Denoiser) -> None:
    for module in model.children():
        for name, p in [*module.named_parameters()]:
            setattr(module, name, nn.Parameter(p.detach() * 1.5))


CHANGES: dict[str, Callable[[Denoiser], object]] = {
    "load_state_dict of a child": _load_into_a_child,
    "load_state_dict by assignment": _assign,
    "foreach": _foreach,
    "vector_to_parameters": _vector,
    "other parameters": _other_parameters,
    "double": lambda model: model.double(),
    "a layer replaced": lambda model: setattr(model, "modulation", nn.Linear(8, 8).eval()),
    "a layer of another size": lambda model: setattr(
        model, "out", nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)).eval()
    ),
    "forward of an instance": lambda model: setattr(
        model.time, "forward", lambda x: nn.Linear.forward(model.time, 2 * x)
    ),
    "a hook": lambda model: model.modulation.register_forward_hook(lambda _, __, out: 2 * out),
    "a pre-hook": lambda model: model.out.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
}


@pytest.mark.filterwarnings("ignore:.*the sampler is built again")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_next_call_is_right(change: Callable[[Denoiser], object]) -> None:
    sampler = warm()
    before = sampler(X, torch.full((2,), 8.0), Y)
    change(model_of(sampler))
    x = X.to(next(model_of(sampler).parameters()).dtype)
    assert exactly(sampler, torch.full((2,), 8.0), x=x)
    after = sampler(x, torch.full((2,), 8.0), Y)
    assert after.dtype == x.dtype and not torch.equal(before, after.to(before.dtype))


def test_a_dtype_is_another_program_and_says_so() -> None:
    sampler = warm()
    model_of(sampler).to(torch.bfloat16)
    with pytest.warns(
        UserWarning,
        match=r"time.weight.dtype was torch.float32 when .* and is torch.bfloat16 now; the sampler is built again",
    ):
        assert exactly(sampler, torch.full((2,), 8.0), x=X.bfloat16())


WHOLE = {"STEP": 3, "REQUEST": 2, "STEP_REQUEST": 6}
PRECISELY: dict[str, tuple[str, dict[str, int]]] = {
    "only the body reads it": ("out.weight", {}),
    "a request's": ("label.weight", {"REQUEST": 2, "STEP_REQUEST": 6}),
    "the modulation's": ("modulation.weight", {"STEP_REQUEST": 6}),
    "the timestep's": ("time.weight", {"STEP": 3, "STEP_REQUEST": 6}),
}


@pytest.mark.parametrize(("name", "runs"), PRECISELY.values(), ids=PRECISELY)
@pytest.mark.parametrize("how", ["in place", "through data", "data assigned", "another parameter"])
def test_only_what_a_weight_feeds_is_computed_again(
    name: str, runs: dict[str, int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = warm()
    counter = Counter(sampler, monkeypatch)
    weight = sampler.model.get_parameter(name)
    if how == "in place":
        with torch.no_grad():
            weight.mul_(2)
    elif how == "through data":
        weight.data.mul_(2)
    elif how == "data assigned":
        weight.data = weight.data * 2
    else:
        owner, _, key = name.partition(".")
        setattr(sampler.model.get_submodule(owner), key, nn.Parameter(weight.detach() * 2))
    assert served(sampler)
    assert counter.taken() == runs
    assert served(sampler) and counter.taken() == {}


def test_loading_what_only_the_body_reads_computes_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = warm()
    counter = Counter(sampler, monkeypatch)
    sampler.load_state_dict({"out.weight": torch.randn(4, 4)}, strict=False)
    assert served(sampler) and counter.taken() == {}
    sampler.load_state_dict({"label.weight": torch.randn(5, 8)}, strict=False)
    assert served(sampler) and counter.taken() == {"REQUEST": 2, "STEP_REQUEST": 6}
    sampler.invalidate()
    assert served(sampler) and counter.taken().keys() >= {"STEP", "REQUEST", "STEP_REQUEST"}


def test_weights_that_count_no_versions_are_followed_after_loading_and_at_the_next_trajectory() -> None:
    with torch.inference_mode():
        model = denoiser().requires_grad_(False)
    sampler = warm(model)
    with torch.inference_mode():
        model.load_state_dict({n: 2 * t for n, t in model.state_dict().items()})
    assert exactly(sampler, 7.0)
    with torch.inference_mode():
        model.get_parameter("time.weight").mul_(2)
    assert all(exactly(sampler, t) for t in TIMES)


def test_an_average_is_swapped_in_and_out() -> None:
    sampler = warm()
    model = model_of(sampler)
    average = {n: p.detach() * 1.5 for n, p in model.named_parameters()}
    own = {n: p.detach().clone() for n, p in model.named_parameters()}
    for state in (average, own, average):
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(state[n])
        assert served(sampler)
    for state in (own, average, own):
        for n, p in model.named_parameters():
            p.data = state[n]
        assert served(sampler)
    parameters = {n: nn.Parameter(t.clone()) for n, t in average.items()}
    for _ in range(3):
        for n, p in [*model.named_parameters()]:
            owner, _, key = n.rpartition(".")
            setattr(model.get_submodule(owner), key, parameters[n])
            parameters[n] = p
        assert served(sampler)
    assert len(sampler._programs) == 1


def test_parameters_untied_by_a_replacement_are_told_apart() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            out: Tensor = self.second(x) * self.first(t[:, None].expand(-1, 4))
            return out

    sampler = warm(Tied().eval())
    sampler.model.second.weight = nn.Parameter(torch.randn(4, 4))  # type: ignore[union-attr]
    with pytest.warns(
        UserWarning,
        match=r"second.weight was a tensor \(4, 4\) .* and is another tensor \(4, 4\) .*; the sampler is built again",
    ):
        assert served(sampler)


def test_a_program_lowered_by_the_compiler_reads_replaced_parameters() -> None:
    sampler = optimize_sampler(denoiser(), 3, backend="aot_eager")
    assert served(sampler)
    _other_parameters(model_of(sampler))
    assert served(sampler)


def test_a_rebuild_needs_all_weights() -> None:
    sampler = warm()
    sampler.release_weights(to="drop")
    model_of(sampler).out.register_forward_hook(lambda _, __, out: 2 * out)
    with pytest.raises(RuntimeError, match="building the sampler again needs weights that release_weights took out"):
        served(sampler)


def test_weights_replaced_after_dropping_are_there_again() -> None:
    model = denoiser()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    sampler = warm(model)
    assert sampler.release_weights(to="drop") > 0
    for name, tensor in state.items():
        owner, _, key = name.partition(".")
        setattr(model.get_submodule(owner), key, nn.Parameter(tensor))
    assert served(sampler) and exactly(sampler, 0.5)
    sampler.restore_weights()  # nothing is out
    assert served(sampler)


# ---- verify


def test_writes_through_data_are_seen_at_the_next_trajectory_at_every_call_or_never() -> None:
    def write(sampler: Sampler) -> None:
        for p in sampler.model.parameters():
            p.data.mul_(1.1)

    for verify in ("trajectory", "always", "never"):
        sampler = warm(verify=verify)
        assert exactly(sampler, 8.0)
        write(sampler)
        in_mid_trajectory = exactly(sampler, 7.0)
        assert in_mid_trajectory == (verify == "always")
        write(sampler)
        assert all(exactly(sampler, t) == (verify != "never") for t in TIMES)
        sampler.invalidate()
        assert served(sampler)


def test_a_trajectory_in_the_middle_of_a_schedule_and_one_of_a_trusted_caller_are_verified() -> None:
    sampler = warm()
    assert exactly(sampler, 7.0) and exactly(sampler, 6.0)
    model_of(sampler).time.weight.data.mul_(2)
    assert exactly(sampler, 7.0) and exactly(sampler, 6.0)
    caller = trusted()
    model_of(caller).time.weight.data.mul_(2)
    assert all(exactly(caller, t) for t in (8.0, 7.0, 6.0, 5.0))


# ---- the structure watch alone
