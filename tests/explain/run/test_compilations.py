"""What a program was compiled for: guards, sizes and numbers."""

from __future__ import annotations

import torch
import torch._dynamo
from torch import Tensor, nn

from fusion_compile.explain._run.compilations import Compilation, read_compilations, read_guards
from fusion_compile.explain._run.listen import listening
from tests.explain.observed import observed
from tests.explain.run.lines import line_of


def test_guards_have_the_users_names_and_lines() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * self.scale  # the use

    module = Scaled()
    seen = observed(module, (torch.randn(4),))
    guards = {guard.text: guard.where for guard in seen.facts.guards}
    assert any("torch.float32" in text and "size=[4]" in text for text in guards)
    assert any(text.endswith(".scale == 2.0") for text in guards)
    assert set(guards.values()) == {line_of(__file__, "the use")}


def test_a_guard_tree_of_torch_211_is_read() -> None:
    text = (
        "| +- GuardManager: source=L['d'], accessed_by=FrameLocalsGuardAccessor(key='d', framelocals_idx=0), "
        "type=<class 'dict'>, tag_safe=(False, False)\n"
        "| | +- EQUALS_MATCH: L['d']['n'] == 3                     # x * d['n']  # src/model.py:4 in forward\n"
        "| | +- GLOBAL_STATE: ___check_global_state() against {}   # x * d['n']  # src/model.py:4 in forward\n"
    )
    guards, types = read_guards(text, {"/home/u/src/model.py"})
    assert [(g.text, g.where) for g in guards] == [("d['n'] == 3", "/home/u/src/model.py:4")]
    assert types == {"d": "dict"}


def compilations_of(fn: object, *calls: tuple[object, ...]) -> list[Compilation]:
    torch.compiler.reset()
    run = torch.compile(fn, backend="eager")  # type: ignore[call-overload]
    with listening() as heard:
        for call in calls:
            run(*call)
    return list(read_compilations(heard.trace).values())


def test_sizes_and_numbers_are_those_that_are_fixed_and_those_of_the_call() -> None:
    def program(x: Tensor, rate: float, count: int) -> Tensor:
        return x.sum() * rate + x.sum() * count

    first, again = compilations_of(program, (torch.randn(8, 4), 0.5, 3), (torch.randn(6, 4), 0.25, 3))
    assert (first.fixed_sizes, first.sizes) == ({"x": (8, 4)}, {"x": (8, 4)})
    assert first.fixed_numbers == {"rate": "0.5", "count": "3"}
    assert again.fixed_sizes == {"x": (None, 4)} and again.sizes["x"] == (6, 4)
    assert again.fixed_numbers == {"count": "3"} and again.numbers["rate"] == "0.25"
