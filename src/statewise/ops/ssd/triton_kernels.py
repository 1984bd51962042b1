"""GPU kernels: matrix products a chunk of tokens at a time, for every head.

Legend (B and C are the paper's matrices, so sizes are spelled out): L tokens of a chunk, S tokens of a segment (whole
chunks), H heads, E heads of a group, P width of a head, N state size; PB and NB: P and N of a tile; t, i, j tokens of a
chunk, p and n columns. h: the state before a chunk; d: the cotangent of the state after it. G: the cotangent of h C.

    M_ij = exp(Σ_{j<l≤i} dt_l A)        W_ij = M_ij (C_i·B_j)        Z_ij = G_i·x_j
    y_i = M_i0 h C_i + Σ_{j≤i} W_ij dt_j x_j               next h = M_L0 h + Σ_j M_Lj dt_j x_j B_jᵀ
    du_j = M_Lj d B_j + Σ_{i≥j} W_ij G_i, of u = dt x      next d, to the left = M_L0 d + Σ_i M_i0 G_i C_iᵀ
    dB_j = Σ_heads dt_j (M_Lj dᵀ x_j + Σ_{i≥j} M_ij Z_ij C_i)
    dC_i = Σ_heads (M_i0 hᵀ G_i + Σ_{j≤i} M_ij Z_ij dt_j B_j)

The logarithm of a token's decay gets all products whose path crosses it; see `weigh`.

Segments are walked by independent programs: `carry` finds what each adds to the state, `pass_on` the state before each,
`emit` the outputs. Where there is one segment a sequence, only `emit` runs. Backward walks them in both directions and
stores the states before all chunks (`emit`) and the cotangents after them (`mirror`); what heads share comes from all
chunks at once (`gather`), as do the step sizes' gradients (`weigh`).

A state is held as slices of NB columns of N, and products over N are sums over slices: what a product reads has to be
in registers beside the state, and all of its columns do not fit. What is used twice is loaded twice for that, too, and
with a store in between where the compiler would else make one load of the two.

Where products are of bfloat16, what goes into the gradients of decays is SPLIT into two terms, and the states that
backward stores are of float16, each with a power of two in `units` (tiles of P, 2, slots, H): these gradients are sums
over all tokens, in which much cancels that rounding errors do not follow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import dot, first_slot, locate_row, locate_slot, lost, onto, sigmoid, silu

__all__ = ["add_up", "carry", "emit", "gather", "mirror", "pass_on", "weigh"]


@triton.jit(do_not_specialize=["time"])
def add_up(
    dt, A, sums, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, L: tl.constexpr, HB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A chunk's step sizes and the sums of log decays through each of its tokens, as two numbers, for every head:
    `sums` (slots, H, 3, L). Tokens that a chunk lacks have step sizes of zero.

    A sum's digits are lost to large decays long gone, and with them those of a difference of two sums. So logarithms
    are split: multiples of 1/128 are summed without rounding, and what is left of them is too small to hurt. Below
    -1000 all decays are zero in any dtype.
    """
    slot = tl.program_id(0).to(tl.int64)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    i, head = tl.arange(0, L), tl.program_id(1) * HB + tl.arange(0, HB)
    if here > 0:
        inside = head < H
        live = (i < here)[:, None] & inside[None, :]
        size = tl.load(dt + (first + i)[:, None] * H + head[None, :], mask=live, other=0.0)
        log = tl.maximum(size * tl.load(A + head, mask=inside, other=0.0)[None, :], -1000.0)
        coarse = tl.floor(log * 128.0) * 0.0078125
        at = sums + (slot * H + head)[None, :] * (3 * L) + i[:, None]
        tl.store(at, size, mask=inside[None, :])
        tl.store(at + L, tl.cumsum(coarse, 0), mask=inside[None, :])
        tl.store(at + 2 * L, tl.cumsum(log - coarse, 0), mask=inside[None, :])


@triton.jit
def _decays(sums, index, L: tl.constexpr):
    """Of a chunk: step sizes; decays through each token, from after it to the end, and of all."""
    at = sums + index * (3 * L) + tl.arange(0, L)
    size, coarse, fine = tl.load(at), tl.load(at + L), tl.load(at + 2 * L)
    end = sums + index * (3 * L) + 2 * L - 1
    all_coarse, all_fine = tl.load(end), tl.load(end + L)
    rest = tl.exp((all_coarse - coarse) + (all_fine - fine))
    return size, tl.exp(coarse + fine), rest, tl.exp(all_coarse + all_fine)


@triton.jit
def _between(sums, index, L: tl.constexpr, TURNED: tl.constexpr):
    """M, zero for j > i; its columns are i if TURNED."""
    t = tl.arange(0, L)
    rows, columns = sums + index * (3 * L) + L + t[:, None], sums + index * (3 * L) + L + t[None, :]
    if TURNED:
        log = (tl.load(columns) - tl.load(rows)) + (tl.load(columns + L) - tl.load(rows + L))
        inside = t[:, None] <= t[None, :]
    else:
        log = (tl.load(rows) - tl.load(columns)) + (tl.load(rows + L) - tl.load(columns + L))
        inside = t[:, None] >= t[None, :]
    return tl.exp(tl.where(inside, log, float("-inf")))


@triton.jit
def _load(base, first, count, row, at, width: tl.constexpr, c, L: tl.constexpr, TO: tl.constexpr):
    """Columns c of rows of `width` numbers, from `at` on, of `count` tokens that are `row` numbers long."""
    i = tl.arange(0, L)
    inside = (i < count)[:, None] & (c < width)[None, :]
    return tl.load(base + first * row + at + (i[:, None] * row + c[None, :]), mask=inside, other=0.0).to(TO)


@triton.jit
def _store(base, first, count, row, at, width: tl.constexpr, c, L: tl.constexpr, value):
    i = tl.arange(0, L)
    inside = (i < count)[:, None] & (c < width)[None, :]
    value = value.to(base.dtype.element_ty)
    tl.store(base + first * row + at + (i[:, None] * row + c[None, :]), value, mask=inside)


@triton.jit
def _load_state(base, index, P: tl.constexpr, N: tl.constexpr, p, n, TO: tl.constexpr):
    inside = (p < P)[:, None] & (n < N)[None, :]
    return tl.load(base + index * (P * N) + (p[:, None] * N + n[None, :]), mask=inside, other=0.0).to(TO)


@triton.jit
def _store_state(base, index, P: tl.constexpr, N: tl.constexpr, p, n, value):
    inside = (p < P)[:, None] & (n < N)[None, :]
    tl.store(base + index * (P * N) + (p[:, None] * N + n[None, :]), value.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _load_gated(rows, z, first, count, row, at, width: tl.constexpr, c, L: tl.constexpr, TO: tl.constexpr):
    """Rows times silu(z), if there is a z."""
    value = _load(rows, first, count, row, at, width, c, L, TO)
    if z is not None:
        value *= silu(_load(z, first, count, row, at, width, c, L, TO))
    return value


@triton.jit
def _move_on(state, rows, columns, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """state + rowsᵀ columns, of both terms of the rows if SPLIT; the columns are exact in the products' dtype."""
    state = onto(state, tl.trans(rows.to(columns.dtype)), columns, PRECISION)
    if SPLIT:
        state = onto(state, tl.trans(lost(rows).to(columns.dtype)), columns, PRECISION, 1)
    return state


@triton.jit
def _unit(state, at, SLICES: tl.constexpr):
    """The power of two in which a state is kept in float16, stored: all of the state is less than 2¹⁵ times as much.
    Not below 2⁻¹⁰⁰."""
    largest = tl.abs(state[0])
    for s in tl.static_range(1, SLICES):
        largest = tl.maximum(largest, tl.abs(state[s]))
    power = (tl.max(largest).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(power * 0.00006103515625, 7.888609052210118e-31)
    tl.store(at, unit)
    return unit


@triton.jit(do_not_specialize=["time", "S"])
def carry(
    rows, z, columns, sums, added, decay, S, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr, FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    L: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state, of x and B, or to the cotangent, of dy and C (REVERSE), and its decay.

    FINE: for the gradients of decays.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, segment, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
    ACC: tl.constexpr = sums.dtype.element_ty
    MUL: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else ACC
    SPLIT: tl.constexpr = PRECISION == "bf16" or PRECISION == "bf16-emulated"
    p = tl.program_id(2) // SLICES * PB + tl.arange(0, PB)
    n = tl.program_id(2) % SLICES * NB + tl.arange(0, NB)
    if (here > 0) | (segment == 0):
        state, passed = tl.zeros([PB, NB], ACC), tl.full([1], 1.0, ACC)
        chunk = first_slot(row, time, cu_seqlens, L, RAGGED) + segment * (S // L)
        chunks = tl.cdiv(here.to(tl.int32), L)
        for step in range(chunks):
            c = chunks - 1 - step if REVERSE else step
            token, count = first + c * L, here.to(tl.int32) - c * L
            size, upto, rest, whole = _decays(sums, (chunk + c) * H + head, L)
            left = _load_gated(rows, z, token, count, H * P, head * P, P, p, L, ACC)
            right = _load(columns, token, count, H // E * N, head // E * N, N, n, L, MUL)
            left *= (upto if REVERSE else rest * size)[:, None]
            state = whole * state + dot(tl.trans(left.to(MUL)), right, PRECISION)
            if SPLIT and FINE:
                state = onto(state, tl.trans(lost(left).to(MUL)), right, PRECISION)
            passed *= whole
        _store_state(added, slot * H + head, P, N, p, n, state)
        tl.store(decay + slot * H + head + tl.arange(0, 1), passed)


@triton.jit(do_not_specialize=["time", "S"])
def pass_on(
    begin, states, decay, S, time, lengths, cu_seqlens, row_of, size,
    H: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What segments add to the state, in `states`, becomes the state before each; or the cotangent after (REVERSE)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, tokens = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, S, RAGGED)
    count = tl.maximum(tl.cdiv(tokens, S), 1).to(tl.int32)
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    state = tl.load(begin + (row * H + head) * size + at, mask=inside, other=0.0)
    for step in range(count):
        index = (slot + (count - 1 - step if REVERSE else step)) * H + head
        added = tl.load(states + index * size + at, mask=inside, other=0.0)
        tl.store(states + index * size + at, state, mask=inside)
        state = tl.load(decay + index) * state + added


@triton.jit(do_not_specialize=["time", "slots", "S"])
def emit(
    x, B, C, D, z, sums, start, y, end, grad_y, gated, d_z, d_D, each, units, parts,
    slots, S, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Outputs of a segment from the state before it; the sequence's last segment has its last state.

    With `grad_y`, for backward, instead: the states before all chunks in `each`, dz and G (`gated`) if there is a gate,
    a row a chunk of `d_D`, and of `parts` (tiles of P, 2, slots, H, L) the first: M_i0 G_i·(h C_i).
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, segment, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
    _, tokens = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    ACC: tl.constexpr = sums.dtype.element_ty
    MUL: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else ACC
    SPLIT: tl.constexpr = PRECISION == "bf16" or PRECISION == "bf16-emulated"
    i, p, n = tl.arange(0, L), tl.program_id(2) * PB + tl.arange(0, PB), tl.arange(0, NB)
    if (here > 0) | (segment == 0):
        final = tokens <= (segment + 1) * S
        h = ()
        for s in tl.static_range(SLICES):
            h += (_load_state(start, slot * H + head, P, N, p, s * NB + n, ACC),)
        chunk = first_slot(row, time, cu_seqlens, L, RAGGED) + segment * (S // L)
        for c in range(tl.cdiv(here.to(tl.int32), L)):
            token, count = first + c * L, here.to(tl.int32) - c * L
            index = (chunk + c) * H + head
            size, upto, rest, whole = _decays(sums, index, L)
            out = tl.zeros([L, PB], ACC)
            if grad_y is not None:
                unit = 1.0
                if SPLIT:
                    unit = _unit(h, units + (tl.program_id(2) * 2 * slots * H + index), SLICES)
                for s in tl.static_range(SLICES if SPLIT else 0):
                    C_ = _load(C, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                    out = onto(out, C_, tl.trans(lost(h[s]).to(MUL)), PRECISION)
                for s in tl.static_range(SLICES):
                    _store_state(each, index, P, N, p, s * NB + n, h[s] * (1.0 / unit))
            for s in tl.static_range(SLICES):
                C_ = _load(C, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                out = onto(out, C_, tl.trans(h[s].to(MUL)), PRECISION)
            out *= upto[:, None]
            if grad_y is not None:
                g = _load_gated(grad_y, z, token, count, H * P, head * P, P, p, L, ACC)
                if z is not None:
                    _store(gated, token, count, H * P, head * P, P, p, L, g)
                tl.store(parts + (tl.program_id(2) * 2 * slots * H + index) * L + i, tl.sum(out * g, 1))
                if d_D is not None:
                    x_ = _load(x, token, count, H * P, head * P, P, p, L, ACC)
                    tl.store(d_D + index * P + p, tl.sum(g * x_, 0), mask=p < P)
            if (y is not None) or (z is not None):
                weights = tl.zeros([L, L], ACC)
                for s in range(SLICES):
                    B_ = _load(B, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                    C_ = _load(C, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                    weights += dot(C_, tl.trans(B_), PRECISION)
                size, upto, rest, whole = _decays(sums, index, L)
                weights = (weights * _between(sums, index, L, False) * size[None, :]).to(MUL)
                x_ = _load(x, token, count, H * P, head * P, P, p, L, MUL)
                out = onto(out, weights, x_, PRECISION)
                if D is not None:
                    out += tl.load(D + head * P + p, mask=p < P, other=0.0)[None, :] * x_.to(ACC)
                if z is not None:
                    gate = _load(z, token, count, H * P, head * P, P, p, L, ACC)
                    gate_open = sigmoid(gate)
                if grad_y is not None:
                    slope = gate_open * (1.0 + gate * (1.0 - gate_open))
                    g = _load(grad_y, token, count, H * P, head * P, P, p, L, ACC)
                    _store(d_z, token, count, H * P, head * P, P, p, L, out * (slope * g))
                elif z is not None:
                    _store(y, token, count, H * P, head * P, P, p, L, out * (gate * gate_open))
                else:
                    _store(y, token, count, H * P, head * P, P, p, L, out)
            size, upto, rest, whole = _decays(sums, index, L)
            late = _load(x, token, count, H * P, head * P, P, p, L, MUL).to(ACC) * (rest * size)[:, None]
            following = ()
            for s in tl.static_range(SLICES):
                B_ = _load(B, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                following += (_move_on(whole * h[s], late, B_, PRECISION, SPLIT and grad_y is not None),)
            h = following
        if end is not None:  # noqa: SIM102 - known when compiling, the other is not
            if final:
                for s in tl.static_range(SLICES):
                    _store_state(end, row * H + head, P, N, p, s * NB + n, h[s])


@triton.jit(do_not_specialize=["time", "slots", "S"])
def mirror(
    x, grad_y, z, B, C, D, sums, start, each, units, last, d_x, parts, slots, S, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Backward through `emit`: dx of a segment from the cotangent after it; the sequence's first segment has that of
    its first state. The cotangents of the states after all chunks go into `each`, and of `parts` the second:
    M_Lj x_j·(d B_j)."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, segment, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
    ACC: tl.constexpr = sums.dtype.element_ty
    MUL: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else ACC
    SPLIT: tl.constexpr = PRECISION == "bf16" or PRECISION == "bf16-emulated"
    i, p, n = tl.arange(0, L), tl.program_id(2) * PB + tl.arange(0, PB), tl.arange(0, NB)
    if (here > 0) | (segment == 0):
        d = ()
        for s in tl.static_range(SLICES):
            d += (_load_state(start, slot * H + head, P, N, p, s * NB + n, ACC),)
        chunk = first_slot(row, time, cu_seqlens, L, RAGGED) + segment * (S // L)
        chunks = tl.cdiv(here.to(tl.int32), L)
        for step in range(chunks):
            c = chunks - 1 - step
            token, count = first + c * L, here.to(tl.int32) - c * L
            index = (chunk + c) * H + head
            size, upto, rest, whole = _decays(sums, index, L)
            unit = 1.0
            if SPLIT:
                unit = _unit(d, units + ((tl.program_id(2) * 2 + 1) * slots * H + index), SLICES)
            to_u = tl.zeros([L, PB], ACC)
            for s in tl.static_range(SLICES if SPLIT else 0):
                B_ = _load(B, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                to_u = onto(to_u, B_, tl.trans(lost(d[s]).to(MUL)), PRECISION)
            for s in tl.static_range(SLICES):
                _store_state(each, index, P, N, p, s * NB + n, d[s] * (1.0 / unit))
            for s in tl.static_range(SLICES):
                B_ = _load(B, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                to_u = onto(to_u, B_, tl.trans(d[s].to(MUL)), PRECISION)
            to_u *= rest[:, None]
            x_ = _load(x, token, count, H * P, head * P, P, p, L, ACC)
            at = parts + ((tl.program_id(2) * 2 + 1) * slots * H + index) * L + i
            tl.store(at, tl.sum(to_u * x_, 1))
            weights = tl.zeros([L, L], ACC)
            for s in range(SLICES):
                B_ = _load(B, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                C_ = _load(C, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                weights = onto(weights, B_, tl.trans(C_), PRECISION)
            weights = (weights * _between(sums, index, L, True)).to(MUL)
            g = _load_gated(grad_y, z, token, count, H * P, head * P, P, p, L, ACC)
            to_u = onto(to_u, weights, g.to(MUL), PRECISION)
            size, upto, rest, whole = _decays(sums, index, L)
            to_x = to_u * size[:, None]
            if D is not None:
                to_x += tl.load(D + head * P + p, mask=p < P, other=0.0)[None, :] * g
            _store(d_x, token, count, H * P, head * P, P, p, L, to_x)
            size, upto, rest, whole = _decays(sums, index, L)
            early = _load_gated(grad_y, z, token, count, H * P, head * P, P, p, L, ACC) * upto[:, None]
            following = ()
            for s in tl.static_range(SLICES):
                C_ = _load(C, token, count, H // E * N, head // E * N, N, s * NB + n, L, MUL)
                following += (_move_on(whole * d[s], early, C_, PRECISION, SPLIT),)
            d = following
        if segment == 0:
            for s in tl.static_range(SLICES):
                _store_state(last, row * H + head, P, N, p, s * NB + n, d[s])


@triton.jit(do_not_specialize=["time", "slots", "total", "EB", "blocks"])
def gather(
    x, g, B, C, sums, states, cotangents, units, through, d_B, d_C, slots, total, EB, blocks,
    time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradients that heads share: a chunk, a tile of N and up to EB heads of a group, one after another.

    What heads add to the gradients of B and C is summed before it is multiplied. Rows of a program's own in `d_B` and
    `d_C` (blocks of heads, all `total` tokens, G, N) are summed by torch. `through` (tiles of N, slots, H) is h·d.
    """
    slot = tl.program_id(0).to(tl.int64)
    tile, block = tl.program_id(1) % SLICES, tl.program_id(1) // SLICES
    group, block = block // blocks, block % blocks
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    ACC: tl.constexpr = sums.dtype.element_ty
    MUL: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else ACC
    SPLIT: tl.constexpr = PRECISION == "bf16" or PRECISION == "bf16-emulated"
    KEPT: tl.constexpr = states.dtype.element_ty
    G: tl.constexpr = H // E
    n = tile * NB + tl.arange(0, NB)
    if here > 0:
        to_B, to_C, pairs = tl.zeros([L, NB], ACC), tl.zeros([L, NB], ACC), tl.zeros([L, L], ACC)
        for e in range(tl.minimum(E - block * EB, EB)):
            head = group * E + block * EB + e
            index = slot * H + head
            size, upto, rest, _whole = _decays(sums, index, L)
            products, passed = tl.zeros([L, L], ACC), tl.zeros([NB], ACC)
            for k in range((P + PB - 1) // PB):
                p = k * PB + tl.arange(0, PB)
                x_ = _load(x, first, here, H * P, head * P, P, p, L, MUL)
                g_ = _load(g, first, here, H * P, head * P, P, p, L, MUL)
                products += dot(x_, tl.trans(g_), PRECISION)
                unit_h, unit_d = 1.0, 1.0
                if SPLIT:
                    unit_h = tl.load(units + (k * 2 * slots * H + index))
                    unit_d = tl.load(units + ((k * 2 + 1) * slots * H + index))
                h = _load_state(states, index, P, N, p, n, KEPT)
                to_C = onto(to_C, (g_.to(ACC) * (upto * unit_h)[:, None]).to(MUL), h.to(MUL), PRECISION)
                d = _load_state(cotangents, index, P, N, p, n, KEPT)
                to_B = onto(to_B, (x_.to(ACC) * (rest * size * unit_d)[:, None]).to(MUL), d.to(MUL), PRECISION)
                passed += (unit_h * unit_d) * tl.sum(h.to(ACC) * d.to(ACC), 0)
            tl.store(through + tile * slots * H + index, tl.sum(passed, 0))
            pairs += products * _between(sums, index, L, True) * size[:, None]
        pairs = pairs.to(MUL)
        to_B = onto(to_B, pairs, _load(C, first, here, G * N, group * N, N, n, L, MUL), PRECISION)
        to_C = onto(to_C, tl.trans(pairs), _load(B, first, here, G * N, group * N, N, n, L, MUL), PRECISION, 1)
        token = block.to(tl.int64) * total + first
        _store(d_B, token, here, G * N, group * N, N, n, L, to_B)
        _store(d_C, token, here, G * N, group * N, N, n, L, to_C)


@triton.jit(do_not_specialize=["time", "slots"])
def weigh(
    x, grad_y, z, A, B, C, sums, through, parts, d_dt, d_A, slots, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, E: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    L: tl.constexpr, PB: tl.constexpr, NB: tl.constexpr, SLICES: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradients of a chunk's step sizes, and its row of those of A, for a head.

    The logarithm of token l's decay gets
        Σ_{j<l≤i} Z_ij W_ij dt_j + Σ_{i≥l} M_i0 G_i·(h C_i) + Σ_{j<l} M_Lj u_j·(d B_j) + M_L0 h·d,
    the products from token to token, from the state before the chunk, to the state after it, and from one to the other.
    """
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    ACC: tl.constexpr = sums.dtype.element_ty
    MUL: tl.constexpr = tl.bfloat16 if PRECISION == "bf16" else ACC
    SPLIT: tl.constexpr = PRECISION == "bf16" or PRECISION == "bf16-emulated"
    i, index = tl.arange(0, L), slot * H + head
    if here > 0:
        scores, products = tl.zeros([L, L], ACC), tl.zeros([L, L], ACC)
        passed = tl.zeros([1], ACC)
        for s in range(SLICES):
            n = s * NB + tl.arange(0, NB)
            B_ = _load(B, first, here, H // E * N, head // E * N, N, n, L, MUL)
            C_ = _load(C, first, here, H // E * N, head // E * N, N, n, L, MUL)
            scores += dot(B_, tl.trans(C_), PRECISION)
            passed += tl.load(through + s * slots * H + index)
        from_begin, to_dt = tl.zeros([L], ACC), tl.zeros([L], ACC)
        for k in range((P + PB - 1) // PB):
            p = k * PB + tl.arange(0, PB)
            x_ = _load(x, first, here, H * P, head * P, P, p, L, MUL)
            g = _load_gated(grad_y, z, first, here, H * P, head * P, P, p, L, ACC)
            products = onto(products, x_, tl.trans(g.to(MUL)), PRECISION)
            if SPLIT and z is not None:
                products = onto(products, x_, tl.trans(lost(g).to(MUL)), PRECISION)
            from_begin += tl.load(parts + (k * 2 * slots * H + index) * L + i)
            to_dt += tl.load(parts + ((k * 2 + 1) * slots * H + index) * L + i)
        products *= scores * _between(sums, index, L, True)
        size, _upto, _rest, whole = _decays(sums, index, L)
        across = tl.cumsum(products * size[:, None], 1, reverse=True) + (size * to_dt)[:, None]
        across = tl.where(i[:, None] < i[None, :], across, from_begin[:, None])
        to_dt += tl.sum(products, 1)
        log = tl.sum(across, 0) + whole * passed
        tl.store(d_dt + first * H + head + i * H, to_dt + tl.load(A + head) * log, mask=i < here)
        tl.store(d_A + index, tl.sum(size * log, 0))
