"""GPU kernels: a program walks a chunk of one sequence, with a block of channels in its lanes.

Legend: L tokens of a chunk, S tokens loaded at once, C channels, W window, CB channels of a program. ``seen(p)`` is the
sample at position p of a sequence: from x, or, before its start, from the window that came as state.

    pre_t = bias + Σ_{k<W} weight[:, k] seen(t-W+1+k)          y = act(pre)
    g = dy act'(pre)        dseen(p) = Σ_k weight[:, W-1-k] g_{p+k}        dweight[:, k] = Σ_t g_t seen(t-W+1+k)

The last W samples and the last W values of g stay in registers and move up by one a step, so each is made once. What
lies W-1 tokens before a chunk and after it is read again (from cache) instead of being handed over, so all programs are
independent; gradients of parameters are one row a chunk, summed in order by torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import locate_row, locate_slot, sigmoid
from statewise.ops.triton_rows import rows, seen

__all__ = ["backward", "forward"]


@triton.jit
def _begin(x, weight, bias, window, row, start, count, t, c, C, W: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The W samples before position t, oldest first; the columns of the weight; the bias."""
    samples = ()
    taps = ()
    for k in tl.static_range(W):
        samples = samples + (seen(x, window, row, start, count, t - W + k, c, C, W),)
        taps = taps + (tl.load(weight + c * W + k, mask=c < C, other=0.0),)
    shift = tl.zeros_like(taps[0])
    if HAS_BIAS:
        shift = tl.load(bias + c, mask=c < C, other=0.0)
    return samples, taps, shift


@triton.jit
def _pre(samples, taps, shift, W: tl.constexpr):
    total = shift
    for k in tl.static_range(W):
        total += taps[k] * samples[k]
    return total


@triton.jit(do_not_specialize=["time"])
def forward(
    x, weight, bias, window, y, end, time, lengths, cu_seqlens, row_of, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    L: tl.constexpr, S: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, chunk, _, here = locate_slot(tl.program_id(0), time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    first = chunk * L
    samples, taps, shift = _begin(x, weight, bias, window, row, start, count, first, c, C, W, HAS_BIAS)
    for group in range(tl.cdiv(tl.maximum(here, 0), S)):
        t = first + group * S
        new = rows(x, start, count, t, c, C, S)
        for s in tl.static_range(S):
            samples = samples[1:] + (new[s].to(shift.dtype),)
            total = _pre(samples, taps, shift, W)
            if SILU:
                total = total * sigmoid(total)
            at = y + (start + t + s) * C + c
            tl.store(at, total.to(y.dtype.element_ty), mask=c < tl.where(t + s < count, C, 0))
    if chunk == 0:  # every sequence has a first chunk, be it empty
        for i in tl.static_range(W - 1):
            last = seen(x, window, row, start, count, count + i - (W - 1), c, C, W)
            tl.store(end + (row * (W - 1) + i) * C + c, last, mask=c < C)


@triton.jit(do_not_specialize=["time"])
def backward(
    x, weight, bias, window, grad_y, grad_end, d_x, d_weight, d_bias, d_window, time, lengths, cu_seqlens, row_of, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    L: tl.constexpr, S: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, chunk, _, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    first = chunk * L
    stop = tl.minimum(first + L, count)
    low = tl.where(chunk == 0, 1 - W, first)  # the first chunk answers for the window too
    samples, taps, shift = _begin(x, weight, bias, window, row, start, count, first, c, C, W, HAS_BIAS)
    total = tl.zeros_like(shift)
    pulls = ()
    for _ in tl.static_range(W):
        pulls = pulls + (total,)
    sums = pulls
    for group in range(tl.cdiv(tl.maximum(here, 0) + W - 1, S)):
        new = rows(x, start, count, first + group * S, c, C, S)
        cotangents = rows(grad_y, start, count, first + group * S, c, C, S)
        for s in tl.static_range(S):
            t = first + group * S + s
            samples = samples[1:] + (new[s].to(shift.dtype),)
            g = cotangents[s].to(shift.dtype)
            if SILU:
                pre = _pre(samples, taps, shift, W)
                gate = sigmoid(pre)
                g = tl.where(t < count, g * gate * (1.0 + pre * (1.0 - gate)), 0.0)
            pulls = pulls[1:] + (g,)
            own = tl.where(t < stop, g, 0.0)  # not the next chunk's
            total += own
            added = ()
            for k in tl.static_range(W):
                added = added + (sums[k] + own * samples[k],)
            sums = added
            p = t - (W - 1)
            i = t - count  # where p stands in the last window
            at = grad_end + (row * (W - 1) + i) * C + c
            found = tl.load(at, mask=c < tl.where((i >= 0) & (i < W - 1), C, 0), other=0.0)
            for k in tl.static_range(W):
                found += taps[W - 1 - k] * pulls[k]
            mine = (p >= low) & (p < stop)
            at = d_x + (start + p) * C + c
            tl.store(at, found.to(d_x.dtype.element_ty), mask=c < tl.where(mine & (p >= 0), C, 0))
            at = d_window + (row * (W - 1) + W - 1 + p) * C + c
            tl.store(at, found, mask=c < tl.where(mine & (p < 0), C, 0))
    # A chunk without tokens has gradients of zero, and says so: torch sums all rows.
    for k in tl.static_range(W):
        tl.store(d_weight + (slot * C + c) * W + k, sums[k], mask=c < C)
    if HAS_BIAS:
        tl.store(d_bias + slot * C + c, total, mask=c < C)
