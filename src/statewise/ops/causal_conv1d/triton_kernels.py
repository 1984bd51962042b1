"""GPU kernels: a program takes a chunk of one sequence and a block of channels.

Legend: L tokens of a chunk, C channels, W window, CB channels of a program. ``seen(p)`` is the sample at position p of
a sequence: from x, or, before its start, from the window that came as state.

    pre_t = bias + Σ_{j<W} weight[:, W-1-j] seen(t-j)          y = act(pre)
    g = dy act'(pre)        dseen(p) = Σ_j weight[:, W-1-j] g_{p+j}        dweight[:, W-1-j] = Σ_t g_t seen(t-j)

Neighbouring chunks are read again (from cache) instead of being handed over, so all programs are independent; gradients
of parameters are one row a chunk, summed in order by torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import locate_row, locate_slot, sigmoid

__all__ = ["backward", "forward"]


@triton.jit
def _seen(x, window, row, start, count, p, c, live_c, C, W: tl.constexpr):
    """Samples at positions p (a vector) and channels c, in the dtype of the window; nothing after the last."""
    inside = (p >= 0) & (p < count)
    new = tl.load(x + (start + p)[:, None] * C + c[None, :], mask=inside[:, None] & live_c[None, :], other=0.0)
    before = (p < 0) & (p >= 1 - W)
    at = window + (row * (W - 1) + W - 1 + p)[:, None] * C + c[None, :]
    old = tl.load(at, mask=before[:, None] & live_c[None, :], other=0.0)
    return new.to(old.dtype) + old


@triton.jit
def _pre(x, weight, bias, window, row, start, count, t, c, live_c, C, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """What goes into the activation at positions t; of any value where t is no token."""
    total = tl.load(weight + c * W + W - 1, mask=live_c, other=0.0)[None, :] * _seen(
        x, window, row, start, count, t, c, live_c, C, W
    )
    for j in tl.static_range(1, W):
        tap = tl.load(weight + c * W + W - 1 - j, mask=live_c, other=0.0)
        total += tap[None, :] * _seen(x, window, row, start, count, t - j, c, live_c, C, W)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=live_c, other=0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["time"])
def forward(
    x, weight, bias, window, y, end, time, lengths, cu_seqlens, row_of, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    L: tl.constexpr, CB: tl.constexpr, WB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, chunk, _, here = locate_slot(tl.program_id(0), time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    t = chunk * L + tl.arange(0, L)
    if here > 0:
        total = _pre(x, weight, bias, window, row, start, count, t, c, live_c, C, W, HAS_BIAS)
        if SILU:
            total = total * sigmoid(total)
        at = y + (start + t)[:, None] * C + c[None, :]
        tl.store(at, total.to(y.dtype.element_ty), mask=(t < count)[:, None] & live_c[None, :])
    if (chunk == 0) & (W > 1):  # every sequence has a first chunk, be it empty
        i = tl.arange(0, WB)
        last = _seen(x, window, row, start, count, count + i - (W - 1), c, live_c, C, W)
        at = end + (row * (W - 1) + i)[:, None] * C + c[None, :]
        tl.store(at, last, mask=(i < W - 1)[:, None] & live_c[None, :])


@triton.jit
def _grad_pre(
    x, weight, bias, window, grad_y, row, start, count, t, c, live_c, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """g at positions t; zero where t is no token."""
    token = ((t >= 0) & (t < count))[:, None] & live_c[None, :]
    g = tl.load(grad_y + (start + t)[:, None] * C + c[None, :], mask=token, other=0.0).to(window.dtype.element_ty)
    if SILU:
        pre = _pre(x, weight, bias, window, row, start, count, t, c, live_c, C, W, HAS_BIAS)
        s = sigmoid(pre)
        g = tl.where(token, g * s * (1.0 + pre * (1.0 - s)), 0.0)
    return g


@triton.jit
def _grad_seen(
    x, weight, bias, window, grad_y, grad_end, row, start, count, p, c, live_c, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dseen at positions p: through the outputs that saw them, and through the last window."""
    i = p - count + W - 1  # where a position stands in the last window
    kept = ((i >= 0) & (i < W - 1))[:, None] & live_c[None, :]
    total = tl.load(grad_end + (row * (W - 1) + i)[:, None] * C + c[None, :], mask=kept, other=0.0)
    for j in tl.static_range(0, W):
        tap = tl.load(weight + c * W + W - 1 - j, mask=live_c, other=0.0)
        total += tap[None, :] * _grad_pre(
            x, weight, bias, window, grad_y, row, start, count, p + j, c, live_c, C, W, SILU, HAS_BIAS
        )
    return total


@triton.jit(do_not_specialize=["time"])
def backward(
    x, weight, bias, window, grad_y, grad_end, d_x, d_weight, d_bias, d_window, time, lengths, cu_seqlens, row_of, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    L: tl.constexpr, CB: tl.constexpr, WB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, chunk, _, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    t = chunk * L + tl.arange(0, L)
    if here > 0:
        found = _grad_seen(
            x, weight, bias, window, grad_y, grad_end, row, start, count, t, c, live_c, C, W, SILU, HAS_BIAS
        )
        at = d_x + (start + t)[:, None] * C + c[None, :]
        tl.store(at, found.to(d_x.dtype.element_ty), mask=(t < count)[:, None] & live_c[None, :])
    # A chunk without tokens has gradients of zero, and says so: torch sums all rows.
    g = _grad_pre(x, weight, bias, window, grad_y, row, start, count, t, c, live_c, C, W, SILU, HAS_BIAS)
    for j in tl.static_range(0, W):
        seen = _seen(x, window, row, start, count, t - j, c, live_c, C, W)
        tl.store(d_weight + (slot * C + c) * W + W - 1 - j, tl.sum(g * seen, 0), mask=live_c)
    if HAS_BIAS:
        tl.store(d_bias + slot * C + c, tl.sum(g, 0), mask=live_c)
    if (chunk == 0) & (W > 1):
        i = tl.arange(0, WB)
        found = _grad_seen(
            x, weight, bias, window, grad_y, grad_end, row, start, count, i - (W - 1), c, live_c, C, W, SILU, HAS_BIAS
        )
        tl.store(
            d_window + (row * (W - 1) + i)[:, None] * C + c[None, :], found, mask=(i < W - 1)[:, None] & live_c[None, :]
        )
