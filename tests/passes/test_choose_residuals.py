"""What a body reads from its table, at the sizes of real models: shapes alone, no memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_compile.passes import BindingTime, Hoisted, exchange_rates, hoist_time_conditioning, lay_out_residuals

CONST, STEP, REQUEST, LIVE = BindingTime.CONST, BindingTime.STEP, BindingTime.REQUEST, BindingTime.LIVE
STEP_REQUEST = BindingTime.STEP_REQUEST
GPU = exchange_rates(torch.device("cuda"))


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def trace(fn: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    graph_module = make_fx(fn)(*inputs)
    graph_module.graph.eliminate_dead_code()
    return graph_module


WIDTH, TEXT, IMAGE = 3072, 512, 4096


def first_block(
    x: Tensor, text: Tensor, t: Tensor, modulation: Tensor, to_q: Tensor, to_k: Tensor, to_v: Tensor
) -> Tensor:
    """The head of Flux's first block: the text stream meets the timestep before it meets the image."""
    shift, scale, gate = F.linear(F.silu(t), modulation).chunk(3, dim=-1)
    h = F.layer_norm(text, (WIDTH,)) * (1 + scale) + shift
    q, k, v = (torch.cat([F.linear(h, w), x], dim=1) for w in (to_q, to_k, to_v))
    return gate * F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def hoist_first_block(n_steps: int, byte_budget: int | None = None) -> Hoisted:
    weights = empty(3 * WIDTH, WIDTH), *(empty(WIDTH, WIDTH) for _ in range(3))
    graph_module = trace(first_block, empty(1, IMAGE, WIDTH), empty(1, TEXT, WIDTH), empty(1, WIDTH), *weights)
    roles = {"x_1": LIVE, "text_1": REQUEST, "t_1": STEP}
    return hoist_time_conditioning(graph_module, roles, n_steps=n_steps, byte_budget=byte_budget, exchange=GPU)


def test_the_first_blocks_text_projections_are_not_worth_a_row_at_every_step() -> None:
    hoisted = hoist_first_block(n_steps=20)
    assert set(hoisted.residuals.values()) == {STEP, REQUEST}  # modulation, and the text itself
    assert hoisted.report.bytes_added < 8 << 20
    assert len(hoisted.report.declined) == 3
    for declined in hoisted.report.declined:
        assert "20 rows of it take 60.0 MiB and computing it costs little" in declined.reason
        assert "byte_budget" in declined.reason


def test_a_budget_of_the_callers_keeps_them() -> None:
    hoisted = hoist_first_block(n_steps=20, byte_budget=256 << 20)
    assert list(hoisted.residuals.values()).count(STEP_REQUEST) == 3
    assert 180 << 20 <= hoisted.report.bytes_added <= 256 << 20
    assert not hoisted.report.declined


def rotated(x: Tensor, ids: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary embedding as diffusers writes it: every block takes its own views of one table."""
    table = torch.cat([torch.outer(ids[:, i], frequencies) for i in range(3)], dim=-1)
    cos, sin = table.cos().repeat_interleave(2, dim=1), table.sin().repeat_interleave(2, dim=1)
    for _ in range(8):
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
        x = x * cos[None, None] + turned * sin[None, None]
    return x


def test_a_rotary_table_is_kept_once() -> None:
    graph_module = trace(
        rotated, empty(1, 24, IMAGE, 96), empty(IMAGE, 3, dtype=torch.float32), empty(16, dtype=torch.float32)
    )
    hoisted = hoist_time_conditioning(graph_module, {"x_1": LIVE, "ids_1": REQUEST}, n_steps=28, exchange=GPU)
    body = hoisted.body.graph_module
    (buffer,) = lay_out_residuals(body, hoisted.residuals)
    assert buffer.time is REQUEST
    assert [part.numel for part in buffer.slices] == [IMAGE * 96, IMAGE * 96]  # cos and sin, not 16 views of them
    assert hoisted.report.bytes_added == 2 * IMAGE * 96 * 4  # one row, whatever the number of steps


def test_what_weights_decide_has_one_row() -> None:
    def fn(x: Tensor, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return x * (w @ v) + t.sin().exp()

    graph_module = trace(fn, empty(64, 64), empty(64), empty(64, 4096), empty(4096, 64))
    hoisted = hoist_time_conditioning(graph_module, {"x_1": LIVE, "t_1": STEP}, n_steps=1000, exchange=GPU)
    assert hoisted.residuals == {"mm": CONST, "exp": STEP}
    assert hoisted.report.bytes_added == 2 * (64 * 64 + 1000 * 64)


def test_weights_read_through_a_view_count_as_weights() -> None:
    """Computing it again would read 16 MiB of weights: through their transpose it reads them all the same."""

    def fn(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        return x + t.expand(512, 512) @ w.t()

    graph_module = trace(fn, empty(512, 16384), empty(512), empty(16384, 512))
    cheap_launches = exchange_rates(torch.device("cpu"))
    hoisted = hoist_time_conditioning(
        graph_module, {"x_1": LIVE, "t_1": REQUEST}, n_steps=1, exchange=type(cheap_launches)(0, 10**9)
    )
    assert list(hoisted.residuals) == ["mm"]


def test_attention_without_dropout_is_hoisted() -> None:
    """Its operator may draw random numbers, so it is marked as if it did."""

    def fn(x: Tensor, text: Tensor, w: Tensor) -> Tensor:
        h = text[None]
        return x + F.linear(F.scaled_dot_product_attention(h, h, h)[0], w)

    graph_module = trace(fn, empty(1, 64, WIDTH), empty(1, 64, WIDTH), empty(WIDTH, WIDTH))
    hoisted = hoist_time_conditioning(graph_module, {"x_1": LIVE, "text_1": REQUEST}, n_steps=28, exchange=GPU)
    assert hoisted.report.nodes_after == 1 and not hoisted.report.declined
