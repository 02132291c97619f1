"""Private torch API: what is compiled, what Dynamo traces, and copies that it compiles again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fusion_compile.explain import _compat


class Doubles(nn.Module):
    def forward(self, x: Tensor, *, by: int = 2) -> Tensor:
        return x * by


def doubled(x: Tensor) -> Tensor:
    return x * 2


def test_compiled_callables_are_known_and_lead_back_to_what_was_compiled() -> None:
    module = Doubles()
    pairs: list[tuple[Callable[..., Any], object]]
    pairs = [(doubled, doubled), (module.forward, module.forward), (module, module.forward)]
    for given, found in pairs:
        compiled = torch.compile(given, backend="eager")
        assert _compat.is_compiled(compiled) and not _compat.is_compiled(given)
        assert _compat.uncompiled(compiled) == found
        assert _compat.uncompiled(given) == given
    in_place = Doubles()
    in_place.compile(backend="eager")
    assert _compat.is_compiled(in_place) and _compat.uncompiled(in_place) is in_place


def test_a_copy_has_its_own_code_and_the_same_defaults() -> None:
    method = Doubles().forward
    copy = _compat.own_code(method)
    assert copy.__self__ is method.__self__ and copy.__func__.__code__ is not method.__func__.__code__  # type: ignore[attr-defined]
    assert copy(torch.ones(2)).tolist() == [2, 2]
    assert _compat.own_code(torch.sin) is torch.sin  # not a Python function


def test_a_module_is_called_bare_only_if_its_forward_is_all_that_a_call_does() -> None:
    assert _compat.may_be_called_bare(Doubles())
    hooked = Doubles()
    hooked.register_forward_hook(lambda *_: None)
    assert not _compat.may_be_called_bare(hooked)
    assert not _compat.may_be_called_bare(nn.Linear(2, 2))  # Dynamo does not trace the frames of torch's own modules


def test_settings_of_the_caches_come_back() -> None:
    from torch._dynamo import pgo
    from torch._inductor import config

    before = config.fx_graph_cache, getattr(pgo, "_CODE_STATE", None)
    with _compat.caches_aside():
        assert config.fx_graph_cache is False
    assert (config.fx_graph_cache, getattr(pgo, "_CODE_STATE", None)) == before


def test_dynamos_refusal_is_found_behind_other_errors() -> None:
    refusal = torch._dynamo.exc.Unsupported("no")
    try:
        raise ValueError("outside") from refusal
    except ValueError as error:
        assert _compat.unsupported_inside(error) is refusal
    assert _compat.unsupported_inside(ValueError("alone")) is None
    assert _compat.user_frames(ValueError()) == []


def test_scheduler_nodes_are_unknown_outside_a_compilation() -> None:
    assert _compat.fx_names("op3_op4") == ()
