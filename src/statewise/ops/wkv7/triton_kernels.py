"""GPU kernels: a program takes a chunk of one head of one sequence; one more walks from chunk to chunk.

Legend: L tokens of a chunk, H heads, K key rows, V value columns, KP and VP the two padded, VB columns of a program of
the scan. D(t, i) = exp(Σ_{i<j≤t} log_w_j). S is the state a chunk starts from, S' the one it ends with; the names of
README.md beside this file: a_in, r_in, b_out, k_out with decays to the chunk's start and end, ab, ak, rb, rk (L, L).

    X = (I - ab)⁻¹      W = X a_in      U = X ak V         what a finds: F = W S + U
    read = r_in + rb W      y = read S + (rb U + rk V)      S' = (diag D(L,0) + move) S + add
    move = b_outᵀ W         add = b_outᵀ U + k_outᵀ V

Backward, with dS' from the chunk after: dF = rbᵀ dy + b_out dS', E = Xᵀ dF, and everything else is a product of two of
dy, E, F, V, S, dS'. dS = readᵀ dy + (diag D(L,0) + move)ᵀ dS'.

What goes between kernels is padded and laid out by (slot, head), so that it needs no masks: padding is zero, but for
its decay, which is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import dot, first_slot, locate_row, locate_slot

__all__ = ["backward", "chunk", "emit", "pull", "scan"]

# Largest total log decay of a chunk for which decays between two positions are split into two factors around the
# chunk's middle: a factor stays below e^20. RWKV-7 forgets at most e^-38.8 in 64 tokens.
_SPLITTABLE = tl.constexpr(40.0)


@triton.jit
def _tokens(x, first, here, head, H, C, L: tl.constexpr, CP: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr):
    """Tokens SHIFT .. SHIFT + L of a chunk, (L, CP); zero where there is none."""
    t = tl.arange(0, L) + SHIFT
    c = tl.arange(0, CP)
    mask = ((t >= 0) & (t < here))[:, None] & (c < C)[None, :]
    return tl.load(x + ((first + t) * H + head)[:, None] * C + c[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _put(x, value, first, here, head, H, C, L: tl.constexpr, CP: tl.constexpr):
    t = tl.arange(0, L)
    c = tl.arange(0, CP)
    mask = (t < here)[:, None] & (c < C)[None, :]
    tl.store(x + ((first + t) * H + head)[:, None] * C + c[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _tile(x, at, R: tl.constexpr, C: tl.constexpr):
    """Where the (R, C) tile number ``at`` of what goes between kernels lies."""
    return x + at * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _one(x, first, i, here, head, H, C, CP: tl.constexpr, ACC: tl.constexpr):
    """Token i of a chunk, (1, CP); zero if there is none."""
    c = tl.arange(0, CP)
    mask = (c < C) & (i + 0 * c < here)
    return tl.load(x + ((first + i) * H + head) * C + c, mask=mask, other=0.0).to(ACC)[None, :]


@triton.jit
def _strong_decay(log_w, first, here, head, H, K, L: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr):
    """Whether some key row of the chunk forgets too much for decays to be split around the middle."""
    total = tl.sum(_tokens(log_w, first, here, head, H, K, L, KP, 0, ACC), 0)
    return tl.min(total, 0) < -_SPLITTABLE


@triton.jit
def _decays(log_w, first, here, head, H, K, L: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr, STRONG: tl.constexpr):
    """Log decays: from the chunk's start through t, through t - 1, from t + 1 through the end, and of it all (KP,)."""
    each = _tokens(log_w, first, here, head, H, K, L, KP, 0, ACC)
    upto = tl.cumsum(each, 0)
    total = tl.sum(each, 0)
    if STRONG:  # sums of the very steps they mean: differences would lose digits, or be inf - inf
        before = tl.cumsum(_tokens(log_w, first, here, head, H, K, L, KP, -1, ACC), 0)
        after = tl.cumsum(_tokens(log_w, first, here, head, H, K, L, KP, 1, ACC), 0, reverse=True)
    else:
        before = upto - each
        after = total[None, :] - upto
    return upto, before, after, total


@triton.jit
def _causal(x, L: tl.constexpr, STRICT: tl.constexpr):
    t = tl.arange(0, L)
    keep = t[:, None] > t[None, :] if STRICT else t[:, None] >= t[None, :]
    return tl.where(keep, x, 0.0)


@triton.jit
def _products_strong(
    r, a, log_w, k, b, first, here, head, H, K, L: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """rb, rk, ab, ak for any log_w ≤ 0: column after column, decays as running products of steps."""
    t = tl.arange(0, L)
    rb = tl.zeros([L, L], ACC)
    rk = tl.zeros([L, L], ACC)
    ab = tl.zeros([L, L], ACC)
    ak = tl.zeros([L, L], ACC)
    down_r = tl.zeros([L, KP], ACC)  # D(t, i)
    down_a = tl.zeros([L, KP], ACC)  # D(t - 1, i)
    for n in range(here):
        i = here - 1 - n
        step = tl.exp(_one(log_w, first, i + 1, here, head, H, K, KP, ACC))
        down_r = tl.where((t == i)[:, None], 1.0, down_r * step)
        down_a = tl.where((t == i + 1)[:, None], 1.0, down_a * step)
        key = _one(k, first, i, here, head, H, K, KP, ACC)
        back = _one(b, first, i, here, head, H, K, KP, ACC)
        column = (t == i)[None, :]
        rb = tl.where(column, tl.sum(r * down_r * back, 1)[:, None], rb)
        rk = tl.where(column, tl.sum(r * down_r * key, 1)[:, None], rk)
        ab = tl.where(column, tl.sum(a * down_a * back, 1)[:, None], ab)
        ak = tl.where(column, tl.sum(a * down_a * key, 1)[:, None], ak)
    return rb, rk, ab, ak


@triton.jit
def _inverse(n, L: tl.constexpr, INVERSE: tl.constexpr):
    """(I - n)⁻¹ of a strictly lower triangular n: of single positions, of pairs, and so on, exact but for rounding.

    No power of n is ever formed: with equal keys those grow and cancel.
    """
    t = tl.arange(0, L)
    x = tl.where(t[:, None] == t[None, :], 1.0, 0.0).to(n.dtype)
    x += tl.where((t[:, None] // 2 == t[None, :] // 2) & (t[:, None] > t[None, :]), n, 0.0)
    size = 2
    while size < L:
        later = t[:, None] // size
        earlier = t[None, :] // size
        border = tl.where((later // 2 == earlier // 2) & (later > earlier), n, 0.0)
        x += dot(dot(x, border, INVERSE), x, INVERSE)
        size *= 2
    return x


@triton.jit
def _chunk(
    r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
    STRONG: tl.constexpr, PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    MID: tl.constexpr = read.dtype.element_ty
    upto, before, after, total = _decays(log_w, first, here, head, H, K, L, KP, ACC, STRONG)
    rs = _tokens(r, first, here, head, H, K, L, KP, 0, ACC)
    as_ = _tokens(a, first, here, head, H, K, L, KP, 0, ACC)
    ks = _tokens(k, first, here, head, H, K, L, KP, 0, ACC)
    bs = _tokens(b, first, here, head, H, K, L, KP, 0, ACC)
    vs = _tokens(v, first, here, head, H, V, L, VP, 0, ACC).to(MID)
    if STRONG:
        rb, rk, ab, ak = _products_strong(rs, as_, log_w, k, b, first, here, head, H, K, L, KP, ACC)
    else:
        middle = 0.5 * total[None, :]
        up = tl.exp(middle - upto)
        r_mid = (rs * tl.exp(upto - middle)).to(MID)
        a_mid = (as_ * tl.exp(before - middle)).to(MID)
        b_mid = tl.trans((bs * up).to(MID))
        k_mid = tl.trans((ks * up).to(MID))
        rb = _causal(dot(r_mid, b_mid, PRECISION), L, False)
        rk = _causal(dot(r_mid, k_mid, PRECISION), L, False)
        ab = _causal(dot(a_mid, b_mid, PRECISION), L, True)
        ak = _causal(dot(a_mid, k_mid, PRECISION), L, True)
    x = _inverse(ab, L, INVERSE).to(MID)
    if KEEP:
        tl.store(_tile(inverse, at, L, L), x)
    w = dot(x, (as_ * tl.exp(before)).to(MID), PRECISION).to(MID)
    u = dot(x, dot(ak, vs, PRECISION).to(MID), PRECISION).to(MID)
    rb = rb.to(MID)
    tl.store(_tile(read, at, L, KP), (rs * tl.exp(upto) + dot(rb, w, PRECISION)).to(MID))
    tl.store(_tile(add_y, at, L, VP), (dot(rb, u, PRECISION) + dot(rk, vs, PRECISION)).to(MID))
    out = tl.exp(after)
    b_out = tl.trans((bs * out).to(MID))
    tl.store(_tile(move, at, KP, KP), dot(b_out, w, PRECISION).to(MID))
    k_out = tl.trans((ks * out).to(MID))
    tl.store(_tile(add, at, KP, VP), (dot(b_out, u, PRECISION) + dot(k_out, vs, PRECISION)).to(MID))
    tl.store(decay + at * KP + tl.arange(0, KP), tl.exp(total))


@triton.jit(do_not_specialize=["time"])
def chunk(
    r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, time, lengths, cu_seqlens, row_of, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, RAGGED: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """A chunk as an affine map of the state, and as what its tokens read."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    ACC: tl.constexpr = decay.dtype.element_ty
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    if here > 0:
        at = slot * H + head
        if _strong_decay(log_w, first, here, head, H, K, L, KP, ACC):
            _chunk(
                r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
                L, KP, VP, KEEP, ACC, True, PRECISION, INVERSE,
            )  # fmt: skip
        else:
            _chunk(
                r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
                L, KP, VP, KEEP, ACC, False, PRECISION, INVERSE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["time"])
def scan(
    move, add, decay, begin, states, end, time, lengths, cu_seqlens, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← (diag(decay) + move) S + add over the chunks of a head, each S kept before it moves on.

    In reverse, with move transposed, from the last chunk to the first: the cotangent of the state each chunk ends with.
    """
    program = tl.program_id(0).to(tl.int64)
    row = program // H
    head = program % H
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, L, RAGGED)
    chunks = tl.cdiv(count, L)
    i = tl.arange(0, KP)
    j = tl.program_id(1) * VB + tl.arange(0, VB)
    live = (i < K)[:, None] & (j < V)[None, :]
    outer = (program * K + i)[:, None] * V + j[None, :]
    inner = i[:, None] * VP + j[None, :]
    across = i[None, :] * KP + i[:, None] if REVERSE else i[:, None] * KP + i[None, :]
    now = tl.load(begin + outer, mask=live, other=0.0)
    at = (slot + chunks - 1 if REVERSE else slot) * H + head
    onward = -H if REVERSE else H
    for _ in range(chunks):
        tl.store(states + at * (KP * VP) + inner, now.to(states.dtype.element_ty))
        matrix = tl.load(move + at * (KP * KP) + across)
        more = tl.load(add + at * (KP * VP) + inner).to(now.dtype)
        down = tl.load(decay + at * KP + i)
        now = down[:, None] * now + more + dot(matrix, now.to(matrix.dtype), PRECISION)
        at += onward
    tl.store(end + outer, now, mask=live)


@triton.jit(do_not_specialize=["time"])
def emit(
    read, add_y, states, y, time, lengths, cu_seqlens, row_of, H, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = read S + add_y."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    if here > 0:
        at = slot * H + head
        seen = dot(tl.load(_tile(read, at, L, KP)), tl.load(_tile(states, at, KP, VP)), PRECISION)
        _put(y, seen + tl.load(_tile(add_y, at, L, VP)), first, here, head, H, V, L, VP)


@triton.jit(do_not_specialize=["time"])
def pull(
    read, grad_y, add, time, lengths, cu_seqlens, row_of, H, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """readᵀ dy: what the outputs of a chunk add to the cotangent of the state it starts from."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    if here > 0:
        at = slot * H + head
        seen = tl.load(_tile(read, at, L, KP))
        dy = _tokens(grad_y, first, here, head, H, V, L, VP, 0, seen.dtype)
        tl.store(_tile(add, at, KP, VP), dot(tl.trans(seen), dy, PRECISION).to(seen.dtype))


@triton.jit
def _column(x, i, L: tl.constexpr):
    """Column i of (L, L), as (L, 1)."""
    return tl.sum(tl.where((tl.arange(0, L) == i)[None, :], x, 0.0), 1)[:, None]


@triton.jit
def _grads_strong(
    r, a, d_rb, d_rk, d_ab, d_ak, log_w, k, b, first, here, head, H, K,
    L: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What :func:`_products_strong` gives back to r, a, b, k and log_w."""
    t = tl.arange(0, L)
    d_r = tl.zeros([L, KP], ACC)
    d_a = tl.zeros([L, KP], ACC)
    d_b = tl.zeros([L, KP], ACC)
    d_k = tl.zeros([L, KP], ACC)
    d_w = tl.zeros([L, KP], ACC)
    down_r = tl.zeros([L, KP], ACC)
    down_a = tl.zeros([L, KP], ACC)
    for n in range(here):
        i = here - 1 - n
        step = tl.exp(_one(log_w, first, i + 1, here, head, H, K, KP, ACC))
        down_r = tl.where((t == i)[:, None], 1.0, down_r * step)
        down_a = tl.where((t == i + 1)[:, None], 1.0, down_a * step)
        key = _one(k, first, i, here, head, H, K, KP, ACC)
        back = _one(b, first, i, here, head, H, K, KP, ACC)
        rb = _column(d_rb, i, L)
        rk = _column(d_rk, i, L)
        ab = _column(d_ab, i, L)
        ak = _column(d_ak, i, L)
        r_here = down_r * (rb * back + rk * key)
        a_here = down_a * (ab * back + ak * key)
        d_r += r_here
        d_a += a_here
        row = (t == i)[:, None]
        d_b = tl.where(row, tl.sum(rb * r * down_r + ab * a * down_a, 0)[None, :], d_b)
        d_k = tl.where(row, tl.sum(rk * r * down_r + ak * a * down_a, 0)[None, :], d_k)
        # D(t, i) holds the steps after i through t; D(t - 1, i) those through t - 1.
        a_here *= a
        passed = tl.cumsum(r * r_here + a_here, 0, reverse=True) - a_here
        d_w += tl.where((t > i)[:, None], passed, 0.0)
    return d_r, d_a, d_b, d_k, d_w


@triton.jit
def _backward(
    r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first, here, head,
    H, K, V, L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, ACC: tl.constexpr, STRONG: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    MID: tl.constexpr = states.dtype.element_ty
    upto, before, after, total = _decays(log_w, first, here, head, H, K, L, KP, ACC, STRONG)
    middle = 0.5 * total[None, :]
    rs = _tokens(r, first, here, head, H, K, L, KP, 0, ACC)
    as_ = _tokens(a, first, here, head, H, K, L, KP, 0, ACC)
    ks = _tokens(k, first, here, head, H, K, L, KP, 0, ACC)
    bs = _tokens(b, first, here, head, H, K, L, KP, 0, ACC)
    vs = _tokens(v, first, here, head, H, V, L, VP, 0, ACC).to(MID)
    dy = _tokens(grad_y, first, here, head, H, V, L, VP, 0, ACC).to(MID)
    if STRONG:
        rb, rk, _, ak = _products_strong(rs, as_, log_w, k, b, first, here, head, H, K, L, KP, ACC)
    else:
        up = tl.exp(middle - upto)
        r_mid = (rs * tl.exp(upto - middle)).to(MID)
        a_mid = (as_ * tl.exp(before - middle)).to(MID)
        b_mid = (bs * up).to(MID)
        k_mid = (ks * up).to(MID)
        rb = _causal(dot(r_mid, tl.trans(b_mid), PRECISION), L, False)
        rk = _causal(dot(r_mid, tl.trans(k_mid), PRECISION), L, False)
        ak = _causal(dot(a_mid, tl.trans(k_mid), PRECISION), L, True)
    ak = ak.to(MID)
    start = tl.load(_tile(states, at, KP, VP))
    pulled = tl.load(_tile(grad_states, at, KP, VP))
    x = tl.load(_tile(inverse, at, L, L))
    a_in = as_ * tl.exp(before)
    out = tl.exp(after)
    b_out = bs * out
    k_out = ks * out
    found = dot(x, (dot(a_in.to(MID), start, PRECISION) + dot(ak, vs, PRECISION)).to(MID), PRECISION).to(MID)
    d_found = dot(tl.trans(rb.to(MID)), dy, PRECISION) + dot(b_out.to(MID), pulled, PRECISION)
    e = dot(tl.trans(x), d_found.to(MID), PRECISION).to(MID)
    d_vs = dot(tl.trans(rk.to(MID)), dy, PRECISION) + dot(tl.trans(ak), e, PRECISION)
    _put(d_v, d_vs + dot(k_out.to(MID), pulled, PRECISION), first, here, head, H, V, L, VP)

    d_rb = _causal(dot(dy, tl.trans(found), PRECISION), L, False).to(MID)
    d_rk = _causal(dot(dy, tl.trans(vs), PRECISION), L, False).to(MID)
    d_ab = _causal(dot(e, tl.trans(found), PRECISION), L, True).to(MID)
    d_ak = _causal(dot(e, tl.trans(vs), PRECISION), L, True).to(MID)

    # log_w of a step is in what reaches from the start over it, in what reaches over it to the end, and in what passes
    # over it inside the chunk. The last is a difference of sums over pairs of positions: those that do not pass over
    # the step cancel, to the last bit, as the very products are added up on both sides.
    to_start = tl.trans(start)
    to_end = tl.trans(pulled)
    d_r_in = dot(dy, to_start, PRECISION) * tl.exp(upto)
    d_a_in = dot(e, to_start, PRECISION) * tl.exp(before)
    d_b_out = dot(found, to_end, PRECISION) * out
    d_k_out = dot(vs, to_end, PRECISION) * out
    back = rs * d_r_in
    back_a = as_ * d_a_in
    ahead = bs * d_b_out + ks * d_k_out
    d_log_w = (tl.exp(total) * tl.sum(start.to(ACC) * pulled.to(ACC), 1))[None, :] + tl.cumsum(ahead, 0) - ahead
    if STRONG:
        d_rs, d_as, d_bs, d_ks, d_ws = _grads_strong(
            rs, as_, d_rb.to(ACC), d_rk.to(ACC), d_ab.to(ACC), d_ak.to(ACC), log_w, k, b, first, here, head, H, K,
            L, KP, ACC,
        )  # fmt: skip
        d_log_w += d_ws
    else:
        d_rs = dot(d_rb, b_mid, PRECISION) + dot(d_rk, k_mid, PRECISION)
        d_as = dot(d_ab, b_mid, PRECISION) + dot(d_ak, k_mid, PRECISION)
        d_bs = dot(tl.trans(d_rb), r_mid, PRECISION) + dot(tl.trans(d_ab), a_mid, PRECISION)
        d_ks = dot(tl.trans(d_rk), r_mid, PRECISION) + dot(tl.trans(d_ak), a_mid, PRECISION)
        back += r_mid.to(ACC) * d_rs - b_mid.to(ACC) * d_bs - k_mid.to(ACC) * d_ks
        back_a += a_mid.to(ACC) * d_as
        d_rs *= tl.exp(upto - middle)
        d_as *= tl.exp(before - middle)
        d_bs *= up
        d_ks *= up
    d_log_w += tl.cumsum(back + back_a, 0, reverse=True) - back_a
    _put(d_r, d_rs + d_r_in, first, here, head, H, K, L, KP)
    _put(d_a, d_as + d_a_in, first, here, head, H, K, L, KP)
    _put(d_b, d_bs + d_b_out, first, here, head, H, K, L, KP)
    _put(d_k, d_ks + d_k_out, first, here, head, H, K, L, KP)
    _put(d_w, d_log_w, first, here, head, H, K, L, KP)


@triton.jit(do_not_specialize=["time"])
def backward(
    r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, decay, d_r, d_w, d_k, d_v, d_a, d_b,
    time, lengths, cu_seqlens, row_of, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All six gradients of a chunk, from the state before it and the cotangent of the one after it."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    ACC: tl.constexpr = decay.dtype.element_ty
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    if here > 0:
        at = slot * H + head
        if _strong_decay(log_w, first, here, head, H, K, L, KP, ACC):
            _backward(
                r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first,
                here, head, H, K, V, L, KP, VP, ACC, True, PRECISION,
            )  # fmt: skip
        else:
            _backward(
                r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first,
                here, head, H, K, V, L, KP, VP, ACC, False, PRECISION,
            )  # fmt: skip
