"""Failed guards in plain words."""

from __future__ import annotations

import pytest

from fusion_compile.explain._run.recompile_reasons import counter_words, number_words, plain_words, size_words


@pytest.mark.parametrize(
    ("guard", "kind", "op"),
    [
        ("lr == 0.1", "python_scalar", "lr"),
        ("self.scale == -1e-05", "python_scalar", "self.scale"),
        ("___stack0 == 1795522717.038696", "recompile", ""),
        ("mode == 'train'", "recompile", "mode"),
        ("self.training == True", "recompile", "self.training"),
        ("mask is None", "recompile", "mask"),
        ("tensor 'x' size mismatch at index 1. expected 4, actual 5", "dynamic_shape", "x.shape[1]"),
        ("tensor 'batch['x']' size mismatch at index 0. expected 4, actual 5", "dynamic_shape", "batch['x'].shape[0]"),
        ("2 <= x.size()[0]", "dynamic_shape", "x"),
        ("tensor 'x' dtype mismatch. expected Float, actual Double", "recompile", "x"),
        ("tensor 'x' requires_grad mismatch. expected requires_grad=0", "recompile", "x"),
        (
            "tensor 'x' dispatch key set mismatch. expected DispatchKeySet(CPU), actual DispatchKeySet(CUDA)",
            "recompile",
            "x",
        ),
        ("expected type of 'x' to be a tensor type, ' but found <class 'torch.nn.Parameter'>", "recompile", "x"),
        ("pos.item() == 0", "host_sync", "pos"),
        ("opt.state[…]['step'] == 1", "python_scalar", "opt.state[…]['step']"),
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
    assert (
        words.why.endswith("compiled again.")
        and "(." not in words.why
        and "DispatchKeySet" not in words.why
        and words.remedy.endswith(".")
    )
    assert "___" not in words.why or "Python number" in words.why


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        (
            "tensor 'x' requires_grad mismatch. expected requires_grad=0",
            "requires_grad of x changed (from False to True)",
        ),
        (
            "tensor 'x' requires_grad mismatch. expected requires_grad=1",
            "requires_grad of x changed (from True to False)",
        ),
        ("tensor 'x' dtype mismatch. expected BFloat16, actual Long", "dtype of x changed (from bfloat16 to int64)"),
        ("tensor 'x' device index mismatch. expected 0, actual 1", "device of x changed (from 0 to 1)"),
        (
            "tensor 'x' dispatch key set mismatch. expected DispatchKeySet(CPU, AutogradCPU), actual "
            "DispatchKeySet(CUDA, AutogradCUDA)",
            "x lay on CPU when the program was compiled and then on CUDA",
        ),
        (
            "tensor 'x' dispatch key set mismatch. expected DispatchKeySet(CPU), actual DispatchKeySet(CPU, "
            "AutogradCPU)",
            "x was one made under torch.inference_mode when the program was compiled and then an ordinary tensor",
        ),
        (
            "tensor 'x' dispatch key set mismatch. expected DispatchKeySet(CPU), actual DispatchKeySet(CPU, Conjugate)",
            "x was another kind of tensor when the program was compiled (what differs: Conjugate)",
        ),
        ("self.training == False", "compiled in eval mode"),
    ],
)
def test_raw_guards_become_sentences(guard: str, said: str) -> None:
    assert said in plain_words(guard, {}).why


def test_state_that_grows_is_held_at_one_size_and_a_counter_is_counted_elsewhere() -> None:
    assert "allocate the largest once" in size_words([("self.keys", 1)], "3", "4").remedy
    assert "drop_last" in size_words([("x", 0)], "8", "6").remedy
    assert "remove it" in counter_words("self.calls", is_read=False).remedy
    assert "buffer" in counter_words("self.calls", is_read=True).remedy
    assert "changed to 0.2" in number_words("lr", "0.1", "0.2").why
