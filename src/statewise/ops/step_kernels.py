"""GPU kernels of one token a row: a program takes the new token of one row and a part of that row's state.

Legend: B rows, C channels, M mixtures, H heads, K key rows, V value columns, N SSM state size, P SSM head width, W
window. KB, VB, ... are the sizes of a program's tile, powers of two. ``x_row`` is how many elements lie between the
rows of x.

``before`` is the state that is read and ``after`` the one that is written: row b of each for token b, or, with
``index``, row ``index[b]`` of a pool that is both. A program reads its part once, writes it once and shares nothing
with others. Sums are taken in ACC, in an order that depends on sizes alone: never on B, nor on what was fastest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import silu, softplus

__all__ = ["causal_conv1d", "selective_scan", "ssd", "token_mix", "token_shift", "wkv4", "wkv6", "wkv7"]


@triton.jit
def _token(index):
    """Of a program: its token, and the row of the state that belongs to it (int64)."""
    token = tl.program_id(0).to(tl.int64)
    if index is None:
        row = token
    else:
        row = tl.load(index + token)
    return token, row


@triton.jit
def _all_read(index):
    """In place, no thread writes before every thread has read."""
    if index is not None:
        tl.debug_barrier()


@triton.jit
def _put(at, value, mask):
    if at.dtype.element_ty == tl.bfloat16:
        value = value.to(tl.float32)  # float64 does not become bfloat16 in one
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def token_shift(x, x_row, before, before_row, after, after_row, index, y, C, CB: tl.constexpr):
    token, row = _token(index)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live = c < C
    old = tl.load(before + row * before_row + c, mask=live)
    new = tl.load(x + token * x_row + c, mask=live)
    _all_read(index)
    _put(y + token * C + c, old, live)
    _put(after + row * after_row + c, new, live)


@triton.jit(do_not_specialize=["tokens"])
def token_mix(
    x, x_row, mix, before, before_row, after, after_row, index, y, tokens, C,
    M: tl.constexpr, ACC: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    token, row = _token(index)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live = c < C
    old = tl.load(before + row * before_row + c, mask=live, other=0.0).to(ACC)
    new = tl.load(x + token * x_row + c, mask=live, other=0.0).to(ACC)
    for m in tl.static_range(M):
        share = tl.load(mix + m * C + c, mask=live, other=0.0).to(ACC)
        _put(y + (m * tokens + token) * C + c, new + (old - new) * share, live)
    _all_read(index)
    _put(after + row * after_row + c, new, live)


@triton.jit
def causal_conv1d(
    x, x_row, weight, bias, before, before_row, after, after_row, index, y, C,
    W: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, WB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    token, row = _token(index)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    i = tl.arange(0, WB)
    live = c < C
    newest = tl.load(x + token * x_row + c, mask=live, other=0.0).to(ACC)
    past = (i < W - 1)[:, None] & live[None, :]
    at = i[:, None].to(tl.int64) * C + c[None, :]
    seen = tl.load(before + row * before_row + at, mask=past, other=0.0).to(ACC)
    seen = tl.where((i == W - 1)[:, None], newest[None, :], seen)
    taps = tl.load(weight + c[None, :] * W + i[:, None], mask=(i < W)[:, None] & live[None, :], other=0.0).to(ACC)
    total = tl.sum(seen * taps, 0)
    if bias is not None:
        total += tl.load(bias + c, mask=live, other=0.0).to(ACC)
    if SILU:
        total = silu(total)
    _all_read(index)
    _put(y + token * C + c, total, live)
    kept = ((i > 0) & (i < W))[:, None] & live[None, :]  # every sample moves one place, the oldest out
    _put(after + row * after_row + at - C, seen, kept)


@triton.jit
def wkv4(
    k, k_row, v, v_row, log_w, u,
    num, num_row, den, den_row, top, top_row,
    num_after, num_after_row, den_after, den_after_row, top_after, top_after_row,
    index, y, C, ACC: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    token, row = _token(index)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live = c < C
    key = tl.load(k + token * k_row + c, mask=live, other=0.0).to(ACC)
    value = tl.load(v + token * v_row + c, mask=live, other=0.0).to(ACC)
    fading = tl.load(log_w + c, mask=live, other=0.0).to(ACC)
    here = key + tl.load(u + c, mask=live, other=0.0).to(ACC)
    above = tl.load(num + row * num_row + c, mask=live, other=0.0).to(ACC)
    below = tl.load(den + row * den_row + c, mask=live, other=0.0).to(ACC)
    largest = tl.load(top + row * top_row + c, mask=live, other=0.0).to(ACC)
    _all_read(index)
    # The average as it stands, with the present token at its bonus.
    most = tl.maximum(largest, here)
    old, now = tl.exp(largest - most), tl.exp(here - most)
    average = (old * above + now * value) / (old * below + now)
    _put(y + token * C + c, average, live)
    # Forget a little, then take the token in.
    faded = largest + fading
    most = tl.maximum(faded, key)
    old, now = tl.exp(faded - most), tl.exp(key - most)
    above = old * above + now * value
    below = old * below + now
    _put(num_after + row * num_after_row + c, above, live)
    _put(den_after + row * den_after_row + c, below, live)
    _put(top_after + row * top_after_row + c, most, live)


@triton.jit
def wkv6(
    r, r_row, log_w, w_row, w_head, w_key, k, k_row, v, v_row, u, u_head, u_key,
    before, before_row, after, after_row, index, y, H,
    K: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    token, row = _token(index)
    head = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, KB)
    j = tl.program_id(2) * VB + tl.arange(0, VB)
    at_key, at_value = head * K + i, head * V + j
    in_key, in_value = i < K, j < V
    at = at_key[:, None] * V + j[None, :]
    inside = in_key[:, None] & in_value[None, :]
    state = tl.load(before + row * before_row + at, mask=inside, other=0.0).to(ACC)
    read = tl.load(r + token * r_row + at_key, mask=in_key, other=0.0).to(ACC)
    key = tl.load(k + token * k_row + at_key, mask=in_key, other=0.0).to(ACC)
    value = tl.load(v + token * v_row + at_value, mask=in_value, other=0.0).to(ACC)
    kept = tl.exp(tl.load(log_w + token * w_row + head * w_head + i * w_key, mask=in_key, other=0.0).to(ACC))
    bonus = tl.load(u + head * u_head + i * u_key, mask=in_key, other=0.0).to(ACC)
    out = tl.sum(read[:, None] * state, 0) + tl.sum(read * bonus * key, 0) * value
    state = kept[:, None] * state + key[:, None] * value[None, :]
    _all_read(index)
    _put(y + token * H * V + at_value, out, in_value)
    _put(after + row * after_row + at, state, inside)


@triton.jit
def wkv7(
    r, r_row, log_w, w_row, k, k_row, v, v_row, a, a_row, b, b_row, before, before_row, after, after_row, index, y, H,
    K: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    token, row = _token(index)
    head = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, KB)
    j = tl.program_id(2) * VB + tl.arange(0, VB)
    at_key, at_value = head * K + i, head * V + j
    in_key, in_value = i < K, j < V
    at = at_key[:, None] * V + j[None, :]
    inside = in_key[:, None] & in_value[None, :]
    state = tl.load(before + row * before_row + at, mask=inside, other=0.0).to(ACC)
    read = tl.load(r + token * r_row + at_key, mask=in_key, other=0.0).to(ACC)
    kept = tl.exp(tl.load(log_w + token * w_row + at_key, mask=in_key, other=0.0).to(ACC))
    key = tl.load(k + token * k_row + at_key, mask=in_key, other=0.0).to(ACC)
    value = tl.load(v + token * v_row + at_value, mask=in_value, other=0.0).to(ACC)
    look = tl.load(a + token * a_row + at_key, mask=in_key, other=0.0).to(ACC)
    back = tl.load(b + token * b_row + at_key, mask=in_key, other=0.0).to(ACC)
    found = tl.sum(look[:, None] * state, 0)  # aᵀ S
    state = kept[:, None] * state + back[:, None] * found[None, :] + key[:, None] * value[None, :]
    out = tl.sum(read[:, None] * state, 0)
    _all_read(index)
    _put(y + token * H * V + at_value, out, in_value)
    _put(after + row * after_row + at, state, inside)


@triton.jit
def selective_scan(
    x, x_row, dt, dt_row, A, B, B_row, C, C_row, D, z, z_row, dt_bias,
    before, before_row, after, after_row, index, y, channels, of_group,
    N: tl.constexpr, SOFTPLUS: tl.constexpr, ACC: tl.constexpr, CB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """``of_group`` channels share a row of B and C; ``None`` if all do."""
    token, row = _token(index)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    n = tl.arange(0, NB)
    live, in_state = c < channels, n < N
    inside = live[:, None] & in_state[None, :]
    at = c[:, None].to(tl.int64) * N + n[None, :]
    state = tl.load(before + row * before_row + at, mask=inside, other=0.0).to(ACC)
    rate = tl.load(A + at, mask=inside, other=0.0).to(ACC)
    value = tl.load(x + token * x_row + c, mask=live, other=0.0).to(ACC)
    size = tl.load(dt + token * dt_row + c, mask=live, other=0.0).to(ACC)
    if dt_bias is not None:
        size += tl.load(dt_bias + c, mask=live, other=0.0).to(ACC)
    if SOFTPLUS:
        size = softplus(size)
    if of_group is None:
        write = tl.load(B + token * B_row + n, mask=in_state, other=0.0).to(ACC)[None, :]
        read = tl.load(C + token * C_row + n, mask=in_state, other=0.0).to(ACC)[None, :]
    else:
        at_group = (c // of_group)[:, None] * N + n[None, :]
        write = tl.load(B + token * B_row + at_group, mask=inside, other=0.0).to(ACC)
        read = tl.load(C + token * C_row + at_group, mask=inside, other=0.0).to(ACC)
    state = tl.exp(size[:, None] * rate) * state + (size * value)[:, None] * write
    out = tl.sum(state * read, 1)
    if D is not None:
        out += tl.load(D + c, mask=live, other=0.0).to(ACC) * value
    if z is not None:
        out *= silu(tl.load(z + token * z_row + c, mask=live, other=0.0).to(ACC))
    _all_read(index)
    _put(y + token * channels + c, out, live)
    _put(after + row * after_row + at, state, inside)


@triton.jit
def ssd(
    x, x_row, dt, dt_row, A, B, B_row, C, C_row, D, D_head, D_width, z, z_row, dt_bias,
    before, before_row, after, after_row, index, y, H, of_group,
    P: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr,
    ACC: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr,
):  # fmt: skip
    """``of_group`` heads share a row of B and C."""
    token, row = _token(index)
    head = tl.program_id(1).to(tl.int64)
    p = tl.program_id(2) * PB + tl.arange(0, PB)
    n = tl.arange(0, NB)
    in_head, in_state = p < P, n < N
    inside = in_head[:, None] & in_state[None, :]
    at_head, at_group = head * P + p, head // of_group * N + n
    at = at_head[:, None] * N + n[None, :]
    state = tl.load(before + row * before_row + at, mask=inside, other=0.0).to(ACC)
    value = tl.load(x + token * x_row + at_head, mask=in_head, other=0.0).to(ACC)
    write = tl.load(B + token * B_row + at_group, mask=in_state, other=0.0).to(ACC)
    read = tl.load(C + token * C_row + at_group, mask=in_state, other=0.0).to(ACC)
    size = tl.load(dt + token * dt_row + head).to(ACC)
    if dt_bias is not None:
        size += tl.load(dt_bias + head).to(ACC)
    if SOFTPLUS:
        size = softplus(size)
    least, most = tl.full((), LEAST, ACC), tl.full((), MOST, ACC)
    size = tl.where(size < least, least, tl.where(size > most, most, size))
    kept = tl.exp(size * tl.load(A + head).to(ACC))
    state = kept * state + (size * value)[:, None] * write[None, :]
    out = tl.sum(state * read[None, :], 1)
    if D is not None:
        out += tl.load(D + head * D_head + p * D_width, mask=in_head, other=0.0).to(ACC) * value
    if z is not None:
        out *= silu(tl.load(z + token * z_row + at_head, mask=in_head, other=0.0).to(ACC))
    _all_read(index)
    _put(y + token * H * P + at_head, out, in_head)
    _put(after + row * after_row + at, state, inside)
