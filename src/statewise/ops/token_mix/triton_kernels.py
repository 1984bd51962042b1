"""GPU kernels: a program walks a chunk of one sequence, with a block of channels in its lanes.

Legend: L tokens of a chunk, S tokens loaded at once, C channels, M ≤ 8 mixtures, CB channels of a program.

    y_m,t = x_t + (x_{t-1} - x_t) mix_m        dmix_m = Σ_t g_m,t (x_{t-1} - x_t)
    dx_t = Σ_m g_m,t (1 - mix_m) + Σ_m g_m,t+1 mix_m

The token before stays in registers; x and all cotangents are read once, but for the first token of the next chunk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import locate_row, locate_slot
from statewise.ops.triton_rows import rows, seen

__all__ = ["backward", "forward"]


@triton.jit
def _mixes(mix, c, C, M: tl.constexpr):
    found = ()
    for m in tl.static_range(M):
        found = found + (tl.load(mix + m * C + c, mask=c < C, other=0.0),)
    return found


@triton.jit(do_not_specialize=["time"])
def forward(
    x, mix, state, end, y0, y1, y2, y3, y4, y5, y6, y7, time, lengths, cu_seqlens, row_of, C,
    M: tl.constexpr, L: tl.constexpr, S: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    row, chunk, _, here = locate_slot(tl.program_id(0), time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    first = chunk * L
    ys = (y0, y1, y2, y3, y4, y5, y6, y7)
    mixes = _mixes(mix, c, C, M)
    before = seen(x, state, row, start, count, first - 1, c, C, 2)
    for group in range(tl.cdiv(tl.maximum(here, 0), S)):
        t = first + group * S
        new = rows(x, start, count, t, c, C, S)
        for s in tl.static_range(S):
            now = new[s].to(before.dtype)
            change = before - now
            live = c < tl.where(t + s < count, C, 0)
            for m in tl.static_range(M):
                y = now + change * mixes[m]
                tl.store(ys[m] + (start + t + s) * C + c, y.to(x.dtype.element_ty), mask=live)
            before = now
    if chunk == 0:  # every sequence has a first chunk, be it empty
        tl.store(end + row * C + c, seen(x, state, row, start, count, count - 1, c, C, 2), mask=c < C)


@triton.jit(do_not_specialize=["time"])
def backward(
    x, mix, state, grad_end, d_x, d_mix, d_state, g0, g1, g2, g3, g4, g5, g6, g7,
    time, lengths, cu_seqlens, row_of, C,
    M: tl.constexpr, L: tl.constexpr, S: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    row, chunk, _, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    first = chunk * L
    stop = tl.minimum(first + L, count)
    low = tl.where(chunk == 0, -1, first)  # the first chunk answers for the state too
    pulls = (g0, g1, g2, g3, g4, g5, g6, g7)
    mixes = _mixes(mix, c, C, M)
    before = seen(x, state, row, start, count, first - 1, c, C, 2)
    kept = tl.zeros_like(before)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (kept,)
    for group in range(tl.cdiv(tl.maximum(here, 0) + 1, S)):
        new = rows(x, start, count, first + group * S, c, C, S)
        cotangents = ()
        for m in tl.static_range(M):
            cotangents = cotangents + (rows(pulls[m], start, count, first + group * S, c, C, S),)
        for s in tl.static_range(S):
            t = first + group * S + s
            now = new[s].to(before.dtype)
            change = tl.where(t < stop, before - now, 0.0)  # the next chunk sums its own
            # To the token before: what it kept for itself, its place as the last token, and what this one owes it.
            found = kept + tl.load(grad_end + row * C + c, mask=c < tl.where(t == count, C, 0), other=0.0)
            kept = tl.zeros_like(before)
            added = ()
            for m in tl.static_range(M):
                g = cotangents[m][s].to(before.dtype)
                owed = g * mixes[m]
                found += owed
                kept += g - owed
                added = added + (sums[m] + g * change,)
            sums = added
            before = now
            p = t - 1
            mine = (p >= low) & (p < stop)
            tl.store(d_x + (start + p) * C + c, found.to(x.dtype.element_ty), mask=c < tl.where(mine & (p >= 0), C, 0))
            tl.store(d_state + row * C + c, found, mask=c < tl.where(mine & (p < 0), C, 0))
    # A chunk without tokens has gradients of zero, and says so: torch sums all rows.
    for m in tl.static_range(M):
        tl.store(d_mix + (slot * M + m) * C + c, sums[m], mask=c < C)
