"""`orthogonalize`: its momentum and iterations against the twin, its options."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from fusion_compile import optim
from fusion_compile.optim.matrix.newton_schulz import orthogonalize
from tests.optim.dominated import dominated
from tests.optim.one_tensor import G1, G2, P, Walk, same
from tests.oracles.newton_schulz import JORDAN, POLAR_EXPRESS, YOU, newton_schulz


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(("table", "twin"), [("jordan", JORDAN), ("quintic", YOU), ("polar_express", POLAR_EXPRESS)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_orthogonalize_averages_looks_ahead_and_iterates(table: str, twin: Any, nesterov: bool, tall: bool) -> None:
    g1, g2, p = (t.T.contiguous() if tall else t for t in (G1, G2, P))
    walk = Walk(optim.orthogonalize(0.8, nesterov=nesterov, coefficients=table, matmul_dtype=torch.float64), p)
    mu = 0.2 * g1
    first = walk(g1)
    mu = 0.8 * mu + 0.2 * g2
    ahead = 0.2 * g2 + 0.8 * mu if nesterov else mu
    same(walk(g2), torch.from_numpy(newton_schulz(ahead.numpy(), twin)))
    # The first direction is g1's whatever the momentum: Newton-Schulz is blind to scale, but for the 1e-6 or less in
    # the norm
    torch.testing.assert_close(first, torch.from_numpy(newton_schulz(g1.numpy(), twin)), rtol=0, atol=1e-4)


def test_orthogonalize_gives_singular_values_near_one_in_every_hot_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = Walk(optim.orthogonalize(0.0, coefficients="quintic", matmul_dtype=dtype))(G1)
        assert out.dtype == torch.float64
        values = torch.linalg.svdvals(out)
        # The quintic's band is [0.978, 1.032]; bf16 rounds each of about ten products by up to 4e-3
        assert float(values.min()) > 0.95 and float(values.max()) < 1.06, (dtype, values)


def test_the_transform_takes_auto_a_tuple_or_none() -> None:
    x = dominated(32, 128, 2, 1.0, signs=False)
    found = {}
    for given in (None, (3,), "auto"):
        transform = optim.orthogonalize(0.0, nesterov=False, matmul_dtype="bf16", gram_restarts=given)
        params = {"spectral/32x128": torch.zeros_like(x)}
        context = optim.Context({"momentum": torch.tensor(0.0)})
        updates, _ = transform.update({"spectral/32x128": x}, transform.init(params), params, context)
        found[given] = updates["spectral/32x128"]
    for given, restarts in ((None, None), ((3,), (3,)), ("auto", (2,))):
        assert torch.equal(found[given], orthogonalize(x, gram_restarts=restarts))
    assert not torch.equal(found[None], found["auto"])


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_hot_dtypes_go_by_short_names_too(name: str, dtype: torch.dtype) -> None:
    x = {"spectral/8x32": torch.randn(1, 8, 32)}
    found = []
    for given in (name, dtype):
        transform = optim.orthogonalize(None, matmul_dtype=given)
        found.append(transform.update(x, transform.init(x), x, optim.Context({}))[0]["spectral/8x32"])
    assert torch.equal(*found)


def test_a_hot_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"matmul_dtype='bf61' cannot run Newton-Schulz; use torch.bfloat16, .* 'bf16'"
    ):
        optim.orthogonalize(matmul_dtype="bf61")


def test_coefficients_and_dtypes_that_are_not_known_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'keller' is not known.*'jordan', 'quintic', 'polar_express'"):
        optim.orthogonalize(coefficients="keller")
    with pytest.raises(ValueError, match=r"matmul_dtype=torch\.int8 cannot run Newton-Schulz"):
        optim.orthogonalize(matmul_dtype=torch.int8)


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_products_are_in_what_the_device_multiplies_fast_unless_a_dtype_is_given(
    monkeypatch: pytest.MonkeyPatch, fast: torch.dtype, backend: str
) -> None:
    module = importlib.import_module("fusion_compile.optim.orthogonalize")
    monkeypatch.setattr(module, "fast_product_dtype", lambda device: fast)
    banks = {"spectral/6x4": torch.randn(2, 6, 4)}
    for given, used in (("auto", fast), ("fp32", torch.float32)):
        part = optim.orthogonalize(None, matmul_dtype=given, gram_restarts="auto")
        named = optim.orthogonalize(None, matmul_dtype=used, gram_restarts="auto")
        context, state = optim.Context({}), part.init(banks)

        def update(part: optim.Transform, state: object, context: optim.Context) -> torch.Tensor:
            return part.update(banks, state, banks, context)[0]["spectral/6x4"]

        run = torch.compile(update, backend=backend) if backend != "eager" else update
        assert torch.equal(run(part, state, context), update(named, state, context))
    notes = optim.muon().notes
    assert [note("cpu").split(",")[0] for note in notes] == [f"Newton-Schulz multiplies in {str(fast)[6:]}"]
    assert optim.muon(matmul_dtype="bf16").notes == ()
