"""Failed guards in plain words."""

from __future__ import annotations

import pytest

from fusion_compile.explain._run.recompile_reasons import plain_words


@pytest.mark.parametrize(
    ("guard", "kind", "op"),
    [
        ("lr == 0.1", "python_scalar", "lr"),
        ("self.scale == -1e-05", "python_scalar", "self.scale"),
        ("___stack0 == 1795522717.038696", "recompile", ""),
        ("mode == 'train'", "recompile", "mode"),
        ("self.training == True", "recompile", "self.training"),
        ("mask is None", "recompile", "mask"),
        ("tensor 'x' size mismatch at index 1. expected 4, actual 5", "dynamic_shape", "x"),
        ("tensor 'batch['x']' size mismatch at index 0. expected 4, actual 5", "dynamic_shape", "batch['x']"),
        ("2 <= x.size()[0]", "dynamic_shape", "x"),
        ("tensor 'x' dtype mismatch. expected Float, actual Double", "recompile", "x"),
        ("tensor 'x' requires_grad mismatch. expected requires_grad=0", "recompile", "x"),
        ("not history", "growing_state", "history"),
        ("len(self.history) == 3", "growing_state", "self.history"),
        ("len(d) != 1", "recompile", "d"),
        ("list(dict.keys(d))[0] == 'a'", "recompile", "d"),
        ("GLOBAL_STATE changed: grad_mode ", "recompile", "grad_mode"),
        ("___check_obj_id(self.w, 140376), type=<class 'torch.nn.parameter.Parameter'>", "rebound_parameter", "self.w"),
        ("___check_obj_id(fn, 140376), type=<class 'function'>", "recompile", "fn"),
        ("___check_type_id(x, 9421)", "recompile", "x"),
        ("Cache line invalidated because ___stack0 got deallocated", "recompile", ""),
        ("something() that nobody foresaw", "recompile", ""),
    ],
)
def test_a_guard_in_plain_words(guard: str, kind: str, op: str) -> None:
    words = plain_words(guard, {"d": "dict", "history": "list", "self.w": "torch.nn.parameter.Parameter"})
    assert (words.kind, words.op) == (kind, op)
    assert words.why.endswith("compiled again.") and words.remedy.endswith(".")
    assert "___" not in words.why or "Python number" in words.why
