"""GPU kernels: chunks of C tokens for the states between them, steps of L tokens inside a chunk.

Legend: C tokens of a chunk, L of a step, H heads, K key rows, V value columns, KB and VB of a program's tile, N all
tokens, acc the dtype of sums. HALF multiplies as bfloat16; DIGITS pieces of log decays, PULLED of their gradients.

    summaries   of every chunk: what it adds to the state and how much of the state it keeps; or, backward, what it adds
                to the state's cotangent
    scan        over chunks, elementwise: the state before each, or the cotangent after each
    emit        outputs of a chunk from the state before it
    backward    gradients of a chunk from the state before it and the cotangent after it

Inside a step a weight between two tokens i < t is Σ_k r_tk D_k k_ik with D the decays of i+1 .. t-1. Tokens are split
in two halves, halves again, down to one: exactly one border between halves of one size lies between i and t, and splits
D into a factor of t (decays from the border to t) and one of i (decays from i to the border). So for each size every
token has one factor, on r in a later half and on k in an earlier: X = factor ⊙ (r or k), and the weights over borders
of that size are the products X Xᵀ. Every exponent is a sum of log decays itself, not a difference of sums: ≤ 0, and as
exact as its terms. Such sums are products with matrices of zeros and ones, so their gradients are, too: d(log_w) adds
up X ⊙ dX over the factors a decay is in, and nothing cancels that was not in it.

All of it is linear in the tiles of K and of V: where there are several, outputs and gradients are one partial a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import dot, first_slot, locate_row, locate_slot

__all__ = ["backward", "emit", "scan", "summaries"]

# In place of -inf, whose product with zero would be no number. Its exponential is zero in any dtype.
_LEAST = tl.constexpr(-10000.0)


@triton.jit
def _tile(x, token, place, live, head, c, live_c, H, width, acc: tl.constexpr):
    """One head of the tokens at ``place`` after ``token``, zeros where there is none. Only what is the same for all has
    a wide address: registers are few."""
    at = x + (token * H + head) * width + (place[:, None] * (H * width) + c[None, :])
    return tl.load(at, mask=live[:, None] & live_c[None, :], other=0.0).to(acc)


@triton.jit
def _put(x, value, token, place, live, head, c, live_c, tile, N, H, width):
    """Among partial results, the tile's."""
    at = x + ((tile.to(tl.int64) * N + token) * H + head) * width + (place[:, None] * (H * width) + c[None, :])
    tl.store(at, value.to(x.dtype.element_ty), mask=live[:, None] & live_c[None, :])


@triton.jit
def _decays(log_w, token, place, live, head, c, live_c, H, width, acc: tl.constexpr, CONSTANT: tl.constexpr):
    """Log decays of tokens; no token forgets nothing."""
    if CONSTANT:
        row = tl.load(log_w + head * width + c, mask=live_c, other=0.0).to(acc)
        x = tl.where(live[:, None], row[None, :], 0.0)
    else:
        x = _tile(log_w, token, place, live, head, c, live_c, H, width, acc)
    return tl.where(x < _LEAST, _LEAST, x)


@triton.jit
def _sums(chosen, x, HALF: tl.constexpr, PIECES: tl.constexpr):
    """chosen @ x, row by row the sums of what is chosen. Of x the first PIECES times 8 bits, exactly; 0: all."""
    chosen = chosen.to(x.dtype)
    if PIECES == 0:
        total = dot(chosen, x, "ieee")
    else:
        total = dot(chosen, x, HALF)
        for _ in tl.static_range(1, PIECES):
            x = x - x.to(tl.bfloat16).to(x.dtype)
            total += dot(chosen, x, HALF)
    return total


@triton.jit
def _added(
    key, value, x, place, PRECISION: tl.constexpr, HALF: tl.constexpr, DIGITS: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """What a step adds to the state (REVERSE: to its cotangent), and the decay over all of it."""
    t, j = place[:, None], place[None, :]
    if REVERSE:
        chosen = j < t
    else:
        chosen = j > t
    factor = tl.exp(_sums(chosen, x, HALF, DIGITS))
    return dot(tl.trans(key * factor), value, PRECISION), tl.exp(tl.sum(x, 0))


@triton.jit(do_not_specialize=["time"])
def summaries(
    key, value, log_w, like, added, keeps, time, lengths, cu_seqlens, row_of, H, K, V, tiles,
    C: tl.constexpr, L: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, DIGITS: tl.constexpr, PULLED: tl.constexpr, CONSTANT: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Key and value are k and v, or, REVERSE, r and the gradient of y."""
    acc: tl.constexpr = like.dtype.element_ty
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, C, RAGGED)
    c, d = tl.program_id(2) // tiles * KB + tl.arange(0, KB), tl.program_id(2) % tiles * VB + tl.arange(0, VB)
    live_c, live_d = c < K, d < V
    place = tl.arange(0, L)
    total, keep = tl.zeros([KB, VB], acc), tl.full([KB], 1.0, acc)
    steps = tl.cdiv(here, L).to(tl.int32)
    for s in range(steps):
        start = s * L
        if REVERSE:
            start = (steps - 1 - s) * L
        live = start + place < here
        token = first + start
        x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
        one = _tile(key, token, place, live, head, c, live_c, H, K, acc)
        other = _tile(value, token, place, live, head, d, live_d, H, V, acc)
        new, kept = _added(one, other, x, place, PRECISION, HALF, DIGITS, REVERSE)
        total = total * kept[:, None] + new
        keep = keep * kept
    if here > 0:
        at = (slot * H + head) * K
        tl.store(added + at * V + (c[:, None] * V + d[None, :]), total, mask=live_c[:, None] & live_d[None, :])
        if tl.program_id(2) % tiles == 0:
            tl.store(keeps + at + c, keep, mask=live_c)


@triton.jit(do_not_specialize=["time"])
def scan(
    added, keeps, begin, end, time, lengths, cu_seqlens, H, K, V,
    C: tl.constexpr, E: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """E elements of a sequence's state, chunk after chunk: each finds what it adds, and leaves what was before it."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, C, RAGGED)
    e = tl.program_id(2) * E + tl.arange(0, E)
    live = e < K * V
    k = e // V
    state = tl.load(begin + (row * H + head) * K * V + e, mask=live, other=0.0)
    chunks = tl.cdiv(count, C).to(tl.int32)
    step, at = H, slot * H + head
    if REVERSE:
        step, at = -H, at + (chunks - 1).to(tl.int64) * H
    # What the next chunk adds is on its way while this one's is used.
    any_e = e < tl.where(chunks > 0, K * V, 0)
    new = tl.load(added + at * K * V + e, mask=any_e, other=0.0)
    keep = tl.load(keeps + at * K + k, mask=any_e, other=0.0)
    for s in range(chunks):
        more = e < tl.where(s + 1 < chunks, K * V, 0)
        next_new = tl.load(added + (at + step) * K * V + e, mask=more, other=0.0)
        next_keep = tl.load(keeps + (at + step) * K + k, mask=more, other=0.0)
        tl.store(added + at * K * V + e, state, mask=live)
        state = state * keep + new
        new, keep = next_new, next_keep
        at += step
    tl.store(end + (row * H + head) * K * V + e, state, mask=live)


@triton.jit(do_not_specialize=["time", "N"])
def emit(
    r, log_w, k, v, u, starts, y, time, lengths, cu_seqlens, row_of, N, H, K, V, tiles,
    C: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, DIGITS: tl.constexpr, PULLED: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """A step a program, which brings the state before the chunk to its start by itself: a loop over steps would hold
    far more in registers."""
    acc: tl.constexpr = starts.dtype.element_ty
    part, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, step = part // (C // L), (part % (C // L)).to(tl.int32)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, C, RAGGED)
    tile = tl.program_id(2) // tiles
    c, d = tile * KB + tl.arange(0, KB), tl.program_id(2) % tiles * VB + tl.arange(0, VB)
    live_c, live_d = c < K, d < V
    place = tl.arange(0, L)
    if step * L < here:
        at = starts + (slot * H + head) * K * V + (c[:, None] * V + d[None, :])
        state = tl.load(at, mask=live_c[:, None] & live_d[None, :], other=0.0)
        for s in range(step):
            token = first + s * L
            live = place < L
            x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
            key = _tile(k, token, place, live, head, c, live_c, H, K, acc)
            value = _tile(v, token, place, live, head, d, live_d, H, V, acc)
            new, kept = _added(key, value, x, place, PRECISION, HALF, DIGITS, False)
            state = state * kept[:, None] + new
        live = step * L + place < here
        token = first + step * L
        t, i = place[:, None], place[None, :]
        apart = t ^ i  # its highest bit is the size of the halves whose border lies between the two
        x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
        read = _tile(r, token, place, live, head, c, live_c, H, K, acc)
        since = read * tl.exp(_sums(i < t, x, HALF, DIGITS))
        out = dot(since, state, PRECISION)
        if PULLED == 1:  # what the state loses in a product of halves, else the largest of the errors
            out += dot(since, state - state.to(tl.bfloat16).to(acc), PRECISION)
        key = _tile(k, token, place, live, head, c, live_c, H, K, acc)
        value = _tile(v, token, place, live, head, d, live_d, H, V, acc)
        bonus = tl.load(u + head * K + c, mask=live_c, other=0.0).to(acc)[None, :]
        out += tl.sum(read * key * bonus, 1)[:, None] * value
        weights = tl.zeros([L, L], acc)
        for level in tl.static_range(LEVELS):
            late, size = ((t >> level) & 1) != 0, apart >> level
            side = tl.where(late, read, key)
            if level > 0:
                chosen = (size == 0) & (late == (i < t)) & (i != t)
                side = side * tl.exp(_sums(chosen, x, HALF, DIGITS))
            weights = tl.where((size == 1) & (i < t), dot(side, tl.trans(side), PRECISION), weights)
        out += dot(weights, value, PRECISION)
        _put(y, out, token, place, live, head, d, live_d, tile, N, H, V)


@triton.jit(do_not_specialize=["time", "N"])
def backward(
    r, log_w, k, v, u, starts, pulls, grad_y, d_r, d_log_w, d_k, d_v, d_u, time, lengths, cu_seqlens, row_of,
    N, H, K, V, tiles,
    C: tl.constexpr, L: tl.constexpr, LEVELS: tl.constexpr, KB: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, HALF: tl.constexpr, DIGITS: tl.constexpr, PULLED: tl.constexpr, CONSTANT: tl.constexpr,
):  # fmt: skip
    """A step a program, as emit: the state before the chunk and the cotangent after it are brought to its borders."""
    acc: tl.constexpr = starts.dtype.element_ty
    part, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, step = part // (C // L), (part % (C // L)).to(tl.int32)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, C, RAGGED)
    steps = tl.cdiv(here, L).to(tl.int32)
    tile_k, tile_v = tl.program_id(2) // tiles, tl.program_id(2) % tiles
    c, d = tile_k * KB + tl.arange(0, KB), tile_v * VB + tl.arange(0, VB)
    live_c, live_d = c < K, d < V
    place = tl.arange(0, L)
    sums = ((part * tiles + tile_v) * H + head) * K + c
    if step >= steps:
        # No tokens have gradients of zero, and say so: torch sums all of them.
        tl.store(d_u + sums, tl.zeros([KB], acc), mask=live_c)
        if CONSTANT:
            tl.store(d_log_w + sums, tl.zeros([KB], acc), mask=live_c)
    else:
        at, states = (slot * H + head) * K * V, c[:, None] * V + d[None, :]
        state = tl.load(starts + at + states, mask=live_c[:, None] & live_d[None, :], other=0.0)
        for s in range(step):
            token = first + s * L
            live = place < L
            x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
            key = _tile(k, token, place, live, head, c, live_c, H, K, acc)
            value = _tile(v, token, place, live, head, d, live_d, H, V, acc)
            new, kept = _added(key, value, x, place, PRECISION, HALF, DIGITS, False)
            state = state * kept[:, None] + new
        pull = tl.load(pulls + at + states, mask=live_c[:, None] & live_d[None, :], other=0.0)
        for s in range(step + 1, steps):
            start = (steps + step - s) * L
            token, live = first + start, start + place < here
            x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
            read = _tile(r, token, place, live, head, c, live_c, H, K, acc)
            grad = _tile(grad_y, token, place, live, head, d, live_d, H, V, acc)
            new, kept = _added(read, grad, x, place, PRECISION, HALF, DIGITS, True)
            pull = pull * kept[:, None] + new
        live = step * L + place < here
        token = first + step * L
        t, i = place[:, None], place[None, :]
        apart = t ^ i  # as in emit
        x = _decays(log_w, token, place, live, head, c, live_c, H, K, acc, CONSTANT)
        read = _tile(r, token, place, live, head, c, live_c, H, K, acc)
        key = _tile(k, token, place, live, head, c, live_c, H, K, acc)
        value = _tile(v, token, place, live, head, d, live_d, H, V, acc)
        grad = _tile(grad_y, token, place, live, head, d, live_d, H, V, acc)
        # Through the whole step.
        d_x = tl.zeros([L, KB], acc) + (tl.exp(tl.sum(x, 0)) * tl.sum(state * pull, 1))[None, :]
        # Through reads of the state before it.
        factor = tl.exp(_sums(i < t, x, HALF, DIGITS))
        d_read = factor * dot(grad, tl.trans(state), PRECISION)
        d_x += _sums(i > t, read * d_read, HALF, PULLED)
        # Through what it adds to the state after it.
        factor = tl.exp(_sums(i > t, x, HALF, DIGITS))
        d_key = factor * dot(value, tl.trans(pull), PRECISION)
        d_x += _sums(i < t, key * d_key, HALF, PULLED)
        d_value = dot(key * factor, pull, PRECISION)
        # Through the weights between its tokens.
        between, back = dot(grad, tl.trans(value), PRECISION), dot(value, tl.trans(grad), PRECISION)
        own = tl.sum(tl.where(t == i, between, 0.0), 1)[:, None]
        between = tl.where(i < t, between, back)  # of the later's row by the earlier's column, and the other way round
        bonus = tl.load(u + head * K + c, mask=live_c, other=0.0).to(acc)[None, :]
        weights = tl.where(t == i, dot(read * bonus, tl.trans(key), PRECISION), 0.0)
        d_read += own * key * bonus
        d_key += own * read * bonus
        tl.store(d_u + sums, tl.sum(own * read * key, 0), mask=live_c)
        for level in tl.static_range(LEVELS):
            late, size = ((t >> level) & 1) != 0, apart >> level
            side = tl.where(late, read, key)
            if level > 0:
                chosen = (size == 0) & (late == (i < t)) & (i != t)
                factor = tl.exp(_sums(chosen, x, HALF, DIGITS))
                side = side * factor
            # The weights transposed: d_value wants them so.
            weights = tl.where((size == 1) & (i > t), dot(side, tl.trans(side), PRECISION), weights)
            d_side = dot(tl.where(size == 1, between, 0.0), side, PRECISION)
            if level > 0:
                chosen = (size == 0) & ((((i >> level) & 1) != 0) == (i > t)) & (i != t)
                d_x += _sums(chosen, side * d_side, HALF, PULLED)
                d_side = d_side * factor
            d_read += tl.where(late, d_side, 0.0)
            d_key += tl.where(late, 0.0, d_side)
        d_value += dot(weights, grad, PRECISION)
        _put(d_r, d_read, token, place, live, head, c, live_c, tile_v, N, H, K)
        _put(d_k, d_key, token, place, live, head, c, live_c, tile_v, N, H, K)
        _put(d_v, d_value, token, place, live, head, d, live_d, tile_k, N, H, V)
        if CONSTANT:
            tl.store(d_log_w + sums, tl.sum(tl.where(live[:, None], d_x, 0.0), 0), mask=live_c)
        else:
            _put(d_log_w, d_x, token, place, live, head, c, live_c, tile_v, N, H, K)
