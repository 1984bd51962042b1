"""GPU kernels: a program takes one sequence, or one segment of it, and a tile of channels, and walks over tokens.

Legend: N state size, NB that as a power of two, C channels, E = C/G channels of a group, CB channels of a tile (a lane
each, so that their N numbers are one thread's), S tokens of a segment, K tokens between kept states, a = exp(dt A).
B and C of the paper are ``b_in`` and ``c_out``. ACC is the dtype of sums.

    h_t = a_t h_{t-1} + (dt_t x_t) B_t         p_t = h_t C_t + D x_t         y_t = p_t silu(z_t)

Backward, with γ_t = dy_t silu(z_t) and q the gradient that arrives from later tokens:

    g_t = C_t γ_t + q        q ← a_t g_t        r_t = q h_{t-1}
    dx = dt (g·B) + D γ      ddt = x (g·B) + r·A      dA = Σ r dt      dB = Σ_channels dt x g      dC = Σ_channels γ h

It goes through chunks of K tokens from the last. In each it runs forward from the kept state, which gives dz and dC and
leaves every fourth state in memory of its own (it stays in cache), and then back from those. Exponentials are powers of
two, A being multiplied by log2 e once.

Tokens are taken four at a time, (4, CB); those that are not there have a step of zero, which changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import first_slot, locate_row, locate_slot, sigmoid, silu, softplus

__all__ = ["backward", "forward", "join", "summary"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _where(
    time, lengths, cu_seqlens, row_of, tiles, E,
    S: tl.constexpr, K: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of this program: slot, first token (int64), tokens, slot of its first kept state, group, which tile of it,
    channels among all and in their group (there if below E)."""
    slot = tl.program_id(0).to(tl.int64) // tiles
    tile = tl.program_id(0) % tiles
    if SPLIT:
        row, segment, start, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
        kept = first_slot(row, time, cu_seqlens, K, RAGGED) + segment * (S // K)
    else:
        start, here = locate_row(slot, time, lengths, cu_seqlens, RAGGED)
        kept = first_slot(slot, time, cu_seqlens, K, RAGGED)
    per_group = tl.cdiv(E, CB)
    group = tile // per_group
    part = tile % per_group
    # Contiguity is denied, so that a channel stays with its lane through every load: nothing is moved between threads.
    i = part * CB + tl.max_contiguous(tl.arange(0, CB), [1])
    return slot, start, tl.maximum(here, 0).to(tl.int32), kept, group, part, group * E + i, i


@triton.jit
def _numbers(i, E, N, NB: tl.constexpr, FULL: tl.constexpr):
    """The numbers of a state, and which of them, (NB, CB), are there."""
    n = tl.max_contiguous(tl.arange(0, NB), [1])
    if FULL:
        live = (n < NB)[:, None] & (i < E)[None, :]
    else:
        live = (n < N)[:, None] & (i < E)[None, :]
    return n, live


@triton.jit
def _tokens(start, t, stop, C, E, c, i, M: tl.constexpr):
    """Where the channels of M tokens from t on lie, (M, CB), and which of them are there."""
    u = t + tl.arange(0, M)[:, None]
    return (start + u) * C + c[None, :], (u < stop) & (i < E)[None, :]


@triton.jit
def _row(x, k: tl.constexpr):
    """Row k of (M, CB). The choice is made while compiling (an addition of zeros in floats could not be left out)."""
    BITS: tl.constexpr = tl.int64 if x.dtype == tl.float64 else tl.int32
    chosen = tl.where(tl.arange(0, x.shape[0])[:, None] == k, x.to(BITS, bitcast=True), 0)
    return tl.sum(chosen, 0).to(x.dtype, bitcast=True)[None, :]


@triton.jit
def _rows_of(one, two, three, four):
    """(4, ...) from its rows."""
    u = tl.arange(0, 4)[:, None]
    return tl.where(u == 0, one, tl.where(u == 1, two, tl.where(u == 2, three, four)))


@triton.jit
def _column(pointer, start, t, stop, stride, N, NB: tl.constexpr, FULL: tl.constexpr):
    """B or C of a token, (NB, 1); of the last before ``stop`` (there is one) if it is not there."""
    n = tl.arange(0, NB)
    at = pointer + (start + tl.minimum(t, stop - 1)) * stride + n
    if FULL:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=n < N, other=0.0)
    return x[:, None]


@triton.jit
def _steps(raw, shift, there, SOFTPLUS: tl.constexpr):
    """Step sizes; zero where there is no token."""
    dt = raw.to(shift.dtype) + shift
    if SOFTPLUS:
        dt = softplus(dt)
    return tl.where(there, dt, 0.0)


@triton.jit
def _advance(h, s, gain, b, rate):
    """The state after a token of step s and gain dt·x."""
    return tl.exp2(s * rate) * h + gain * b


@triton.jit
def _vector(pointer, c, i, E, ACC: tl.constexpr, CB: tl.constexpr, HAS: tl.constexpr):
    """One number a channel, (1, CB); zeros if there are none."""
    if HAS:
        x = tl.load(pointer + c, mask=i < E, other=0.0)
    else:
        x = tl.zeros((CB,), ACC)
    return x[None, :]


@triton.jit(do_not_specialize=["time"])
def forward(
    x, dt, b_in, c_out, z, A, D, bias, begin, y, end, kept, time, lengths, cu_seqlens, row_of, tiles, C, E, G, N,
    by_channel, by_number,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr,
    SPLIT: tl.constexpr, RAGGED: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """y; the last state, unless that is found where segments are joined; every K-th state, if it is to be kept."""
    ACC: tl.constexpr = begin.dtype.element_ty
    slot, start, here, keep_at, group, _, c, i = _where(
        time, lengths, cu_seqlens, row_of, tiles, E, S, K, CB, RAGGED, SPLIT
    )
    n, live = _numbers(i, E, N, NB, FULL)
    state = slot * C * N + c[None, :] * by_channel + n[:, None] * by_number
    h = tl.load(begin + state, mask=live, other=0.0)
    rate = tl.load(A + c[None, :] * N + n[:, None], mask=live, other=0.0) * LOG2E
    skip, shift = _vector(D, c, i, E, ACC, CB, HAS_D), _vector(bias, c, i, E, ACC, CB, HAS_BIAS)
    b_in += group * N
    c_out += group * N
    # The next four tokens are fetched while these are worked on.
    at, there = _tokens(start, 0, here, C, E, c, i, 4)
    now_x, now_dt = tl.load(x + at, mask=there, other=0.0), tl.load(dt + at, mask=there, other=0.0)
    now_z = now_x
    if HAS_Z:
        now_z = tl.load(z + at, mask=there, other=0.0)
    for t in range(0, here, 4):
        after, more = _tokens(start, t + 4, here, C, E, c, i, 4)
        next_x, next_dt = tl.load(x + after, mask=more, other=0.0), tl.load(dt + after, mask=more, other=0.0)
        next_z = next_x
        if HAS_Z:
            next_z = tl.load(z + after, mask=more, other=0.0)
        if KEEP:  # noqa: SIM102 (one is decided while compiling)
            if t % K == 0:
                tl.store(kept + (keep_at + t // K) * C * N + n[:, None] * C + c[None, :], h, mask=live)
        u = now_x.to(ACC)
        s = _steps(now_dt, shift, there, SOFTPLUS)
        gain = s * u
        b = _column(b_in, start, t, here, G * N, N, NB, FULL)
        o = _column(c_out, start, t, here, G * N, N, NB, FULL)
        h = _advance(h, _row(s, 0), _row(gain, 0), b, rate)
        y0 = tl.sum(h * o, 0)[None, :]
        b = _column(b_in, start, t + 1, here, G * N, N, NB, FULL)
        o = _column(c_out, start, t + 1, here, G * N, N, NB, FULL)
        h = _advance(h, _row(s, 1), _row(gain, 1), b, rate)
        y1 = tl.sum(h * o, 0)[None, :]
        b = _column(b_in, start, t + 2, here, G * N, N, NB, FULL)
        o = _column(c_out, start, t + 2, here, G * N, N, NB, FULL)
        h = _advance(h, _row(s, 2), _row(gain, 2), b, rate)
        y2 = tl.sum(h * o, 0)[None, :]
        b = _column(b_in, start, t + 3, here, G * N, N, NB, FULL)
        o = _column(c_out, start, t + 3, here, G * N, N, NB, FULL)
        h = _advance(h, _row(s, 3), _row(gain, 3), b, rate)
        y3 = tl.sum(h * o, 0)[None, :]
        p = _rows_of(y0, y1, y2, y3) + skip * u
        if HAS_Z:
            p = p * silu(now_z.to(ACC))
        tl.store(y + at, p.to(y.dtype.element_ty), mask=there)
        now_x, now_dt, now_z, at, there = next_x, next_dt, next_z, after, more
    if not SPLIT:
        tl.store(end + state, h, mask=live)


@triton.jit
def _store_summed(pointer, start, t, stop, stride, N, v, M: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr):
    """(M, NB, CB) of tokens from t on, summed over channels. Turned round first: most of a sum is then one thread's."""
    found = tl.sum(tl.trans(tl.reshape(v, (M * NB, CB))), 0)
    i = tl.arange(0, M * NB)
    t, n = t + i // NB, i % NB
    tl.store(pointer + (start + t) * stride + n, found, mask=(n < N) & (t < stop))


@triton.jit(do_not_specialize=["time", "tokens"])
def backward(
    x, dt, b_in, c_out, z, A, D, bias, kept, own, grad_y, grad_end,
    d_x, d_dt, d_b, d_c, d_z, d_A, d_D, d_bias, d_begin,
    time, lengths, cu_seqlens, row_of, tokens, tiles, C, E, G, N, by_channel, by_number,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr, RAGGED: tl.constexpr, S: tl.constexpr, K: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """All gradients; those of B and C one part a tile of channels, those without a time axis one part a slot."""
    ACC: tl.constexpr = kept.dtype.element_ty
    slot, start, here, keep_at, group, part, c, i = _where(
        time, lengths, cu_seqlens, row_of, tiles, E, S, K, CB, RAGGED, SPLIT
    )
    n, live = _numbers(i, E, N, NB, FULL)
    state = slot * C * N + c[None, :] * by_channel + n[:, None] * by_number
    q = tl.load(grad_end + state, mask=live, other=0.0)
    rate = tl.load(A + c[None, :] * N + n[:, None], mask=live, other=0.0) * LOG2E
    skip, shift = _vector(D, c, i, E, ACC, CB, HAS_D), _vector(bias, c, i, E, ACC, CB, HAS_BIAS)
    d_rate = tl.zeros((NB, CB), ACC)
    d_skip, d_shift = tl.zeros((CB,), ACC), tl.zeros((CB,), ACC)
    one = tl.arange(0, 2)[:, None] == 0
    first = one[:, :, None]
    own += tl.program_id(0).to(tl.int64) * (K // 4 * NB * CB) + n[:, None] * CB + (i - part * CB)[None, :]
    b_in += group * N
    c_out += group * N
    d_b += part * tokens * G * N + group * N  # this tile's part
    d_c += part * tokens * G * N + group * N
    chunks = tl.cdiv(here, K)
    for j in range(0, chunks):
        base = (chunks - 1 - j) * K
        stop = tl.minimum(base + K, here)
        h = tl.load(kept + (keep_at + base // K) * C * N + n[:, None] * C + c[None, :], mask=live, other=0.0)
        for t in range(base, stop, 2):  # two at a time, here and below, for want of registers
            at, there = _tokens(start, t, stop, C, E, c, i, 2)
            u = tl.load(x + at, mask=there, other=0.0).to(ACC)
            s = _steps(tl.load(dt + at, mask=there, other=0.0), shift, there, SOFTPLUS)
            f = tl.load(grad_y + at, mask=there, other=0.0).to(ACC)
            if t % 4 == 0:
                tl.store(own + (t - base) // 4 * NB * CB, h)
            gain = s * u
            h0 = _advance(h, _row(s, 0), _row(gain, 0), _column(b_in, start, t, stop, G * N, N, NB, FULL), rate)
            h = _advance(h0, _row(s, 1), _row(gain, 1), _column(b_in, start, t + 1, stop, G * N, N, NB, FULL), rate)
            if HAS_Z:
                gate = tl.load(z + at, mask=there, other=0.0).to(ACC)
                y0 = tl.sum(h0 * _column(c_out, start, t, stop, G * N, N, NB, FULL), 0)[None, :]
                y1 = tl.sum(h * _column(c_out, start, t + 1, stop, G * N, N, NB, FULL), 0)[None, :]
                open = sigmoid(gate)
                grad = f * (tl.where(one, y0, y1) + skip * u) * (open * (1.0 + gate * (1.0 - open)))
                tl.store(d_z + at, grad.to(d_z.dtype.element_ty), mask=there)
                f = f * (gate * open)
            v = tl.where(first, (_row(f, 0) * h0)[None], (_row(f, 1) * h)[None])
            _store_summed(d_c, start, t, stop, G * N, N, v, 2, NB, CB)
        tl.debug_barrier()
        last = base + (stop - base - 1) // 2 * 2
        for back in range(0, stop - base, 2):
            t = last - back
            h0 = tl.load(own + (t - base) // 4 * NB * CB)
            if t % 4 == 2:
                at, there = _tokens(start, t - 2, stop, C, E, c, i, 2)
                s = _steps(tl.load(dt + at, mask=there, other=0.0), shift, there, SOFTPLUS)
                gain = s * tl.load(x + at, mask=there, other=0.0).to(ACC)
                b0 = _column(b_in, start, t - 2, stop, G * N, N, NB, FULL)
                b1 = _column(b_in, start, t - 1, stop, G * N, N, NB, FULL)
                h0 = _advance(h0, _row(s, 0), _row(gain, 0), b0, rate)
                h0 = _advance(h0, _row(s, 1), _row(gain, 1), b1, rate)
            at, there = _tokens(start, t, stop, C, E, c, i, 2)
            u = tl.load(x + at, mask=there, other=0.0).to(ACC)
            raw = tl.load(dt + at, mask=there, other=0.0)
            s = _steps(raw, shift, there, SOFTPLUS)
            f = tl.load(grad_y + at, mask=there, other=0.0).to(ACC)
            if HAS_Z:
                f = f * silu(tl.load(z + at, mask=there, other=0.0).to(ACC))
            gain = s * u
            b0 = _column(b_in, start, t, stop, G * N, N, NB, FULL)
            b1 = _column(b_in, start, t + 1, stop, G * N, N, NB, FULL)
            e0, e1 = tl.exp2(_row(s, 0) * rate), tl.exp2(_row(s, 1) * rate)
            h1 = e0 * h0 + _row(gain, 0) * b0
            g1 = _row(f, 1) * _column(c_out, start, t + 1, stop, G * N, N, NB, FULL) + q
            along1 = tl.sum(g1 * b1, 0)[None, :]
            q = g1 * e1
            r = q * h1
            d_rate += r * _row(s, 1)
            slope1 = tl.sum(r * rate, 0)[None, :]
            g0 = _row(f, 0) * _column(c_out, start, t, stop, G * N, N, NB, FULL) + q
            q = g0 * e0
            r = q * h0
            d_rate += r * _row(s, 0)
            along = tl.where(one, tl.sum(g0 * b0, 0)[None, :], along1)
            slope = tl.where(one, tl.sum(r * rate, 0)[None, :], slope1) * LN2 + along * u
            if SOFTPLUS:
                before = raw.to(ACC) + shift
                slope = tl.where(before > 20.0, slope, slope * sigmoid(before))
            slope = tl.where(there, slope, 0.0)
            tl.store(d_x + at, (along * s + skip * f).to(d_x.dtype.element_ty), mask=there)
            tl.store(d_dt + at, slope.to(d_dt.dtype.element_ty), mask=there)
            if HAS_D:
                d_skip += tl.sum(f * u, 0)
            if HAS_BIAS:
                d_shift += tl.sum(slope, 0)
            v = tl.where(first, (g0 * _row(gain, 0))[None], (g1 * _row(gain, 1))[None])
            _store_summed(d_b, start, t, stop, G * N, N, v, 2, NB, CB)
        tl.debug_barrier()  # before the next chunk's states take the place of these
    tl.store(d_A + slot * C * N + n[:, None] * C + c[None, :], d_rate, mask=live)
    if HAS_D:
        tl.store(d_D + slot * C + c, d_skip, mask=i < E)
    if HAS_BIAS:
        tl.store(d_bias + slot * C + c, d_shift, mask=i < E)
    if not SPLIT:
        tl.store(d_begin + state, q, mask=live)


@triton.jit(do_not_specialize=["time"])
def summary(
    x, dt, b_in, c_out, z, A, bias, grad_y, total, ends, time, lengths, cu_seqlens, row_of, tiles, C, E, G, N,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, BACK: tl.constexpr, RAGGED: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A segment from nothing: its last state (``BACK``: q before its first token), and the sum of its steps."""
    ACC: tl.constexpr = ends.dtype.element_ty
    slot, start, here, _, group, _, c, i = _where(time, lengths, cu_seqlens, row_of, tiles, E, S, K, CB, RAGGED, True)
    n, live = _numbers(i, E, N, NB, FULL)
    rate = tl.load(A + c[None, :] * N + n[:, None], mask=live, other=0.0) * LOG2E
    shift = _vector(bias, c, i, E, ACC, CB, HAS_BIAS)
    h, steps = tl.zeros((NB, CB), ACC), tl.zeros((4, CB), ACC)
    if BACK:
        c_out += group * N
    else:
        b_in += group * N
    for done in range(0, here, 4):
        if BACK:
            t = (here - 1) // 4 * 4 - done
        else:
            t = done
        at, there = _tokens(start, t, here, C, E, c, i, 4)
        s = _steps(tl.load(dt + at, mask=there, other=0.0), shift, there, SOFTPLUS)
        steps += s
        if BACK:
            f = tl.load(grad_y + at, mask=there, other=0.0).to(ACC)
            if HAS_Z:
                f = f * silu(tl.load(z + at, mask=there, other=0.0).to(ACC))
            h += _row(f, 3) * _column(c_out, start, t + 3, here, G * N, N, NB, FULL)
            h = h * tl.exp2(_row(s, 3) * rate) + _row(f, 2) * _column(c_out, start, t + 2, here, G * N, N, NB, FULL)
            h = h * tl.exp2(_row(s, 2) * rate) + _row(f, 1) * _column(c_out, start, t + 1, here, G * N, N, NB, FULL)
            h = h * tl.exp2(_row(s, 1) * rate) + _row(f, 0) * _column(c_out, start, t, here, G * N, N, NB, FULL)
            h = h * tl.exp2(_row(s, 0) * rate)
        else:
            gain = s * tl.load(x + at, mask=there, other=0.0).to(ACC)
            h = _advance(h, _row(s, 0), _row(gain, 0), _column(b_in, start, t, here, G * N, N, NB, FULL), rate)
            h = _advance(h, _row(s, 1), _row(gain, 1), _column(b_in, start, t + 1, here, G * N, N, NB, FULL), rate)
            h = _advance(h, _row(s, 2), _row(gain, 2), _column(b_in, start, t + 2, here, G * N, N, NB, FULL), rate)
            h = _advance(h, _row(s, 3), _row(gain, 3), _column(b_in, start, t + 3, here, G * N, N, NB, FULL), rate)
    tl.store(ends + slot * C * N + n[:, None] * C + c[None, :], h, mask=live)
    tl.store(total + slot * C + c, tl.sum(steps, 0), mask=i < E)


@triton.jit(do_not_specialize=["time"])
def join(
    A, total, ends, begin, last, time, lengths, cu_seqlens, blocks, C, N,
    BACK: tl.constexpr, RAGGED: tl.constexpr, S: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """What each segment starts from (``BACK``: the q that reaches its end), in place of ``ends``; what is left at last.

    A program takes CB numbers of a sequence's state."""
    row = tl.program_id(0).to(tl.int64) // blocks
    i = tl.program_id(0) % blocks * CB + tl.arange(0, CB)
    live = i < C * N
    n, c = i // C, i % C
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, S, RAGGED)
    segments = tl.cdiv(count, S).to(tl.int32)
    rate = tl.load(A + c * N + n, mask=live, other=0.0) * LOG2E
    h = tl.load(begin + (row * C + c) * N + n, mask=live, other=0.0)
    for j in range(0, segments):
        if BACK:
            now = slot + segments - 1 - j
        else:
            now = slot + j
        end = tl.load(ends + now * C * N + i, mask=live, other=0.0)
        tl.store(ends + now * C * N + i, h, mask=live)
        h = tl.exp2(tl.load(total + now * C + c, mask=live, other=0.0) * rate) * h + end
    tl.store(last + (row * C + c) * N + n, h, mask=live)
