"""GPU kernels: a program takes a chunk of one head of one sequence; one more walks from chunk to chunk.

Legend: L tokens of a chunk, H heads, K key rows, V value columns, KP and VP the two padded, VB columns of a program of
the scan, CB key rows at a time. D(t, i) = exp(Σ_{i<j≤t} log_w_j). S is the state a chunk starts from, S' the one it
ends with; the names of README.md beside this file: a_in, r_in, b_out, k_out with decays to the chunk's start and end,
and ab, ak, rb, rk (L, L). PRECISION is that of products, FINE that of what is inside a chunk.

    X = (I - ab)⁻¹      W = X a_in      U = X ak V         what a finds: F = W S + U
    read = r_in + rb W      y = read S + (rb U + rk V)      S' = (diag D(L,0) + move) S + add
    move = b_outᵀ W         add = b_outᵀ U + k_outᵀ V

Backward, with dS' from the chunk after: dF = rbᵀ dy + b_out dS', E = Xᵀ dF, and everything else is a product of two of
dy, E, F, V, S, dS'. dS = readᵀ dy + (diag D(L,0) + move)ᵀ dS'.

Sequences are walked whole, or, where they and heads are few, in segments of S tokens (whole chunks): `carry` finds
what each makes of the state it starts from, `pass_on` that state, and `scan` walks all of them at once.

What goes between kernels is padded and laid out by (slot, head), so that it needs no masks: padding is zero, but for
its decay, which is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import apart, dot, first_slot, locate_row, locate_slot, onto

__all__ = ["backward", "carry", "chunk", "emit", "pass_on", "pull", "scan"]

# Largest total log decay of a chunk for which decays between two positions are split into two factors around the
# chunk's middle: a factor stays below e^20. RWKV-7 forgets at most e^-38.8 in 64 tokens.
_SPLITTABLE = tl.constexpr(40.0)


@triton.jit
def _tokens(
    x, first, here, head, H, C, c0, L: tl.constexpr, CB: tl.constexpr, SHIFT: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Columns c0 .. c0 + CB of tokens SHIFT .. SHIFT + L of a chunk; zero where there is none."""
    t = tl.arange(0, L) + SHIFT
    c = c0 + tl.arange(0, CB)
    mask = ((t >= 0) & (t < here))[:, None] & (c < C)[None, :]
    # One address of 64 bits, and small distances from it.
    return tl.load(x + (first * H + head) * C + (t * (H * C))[:, None] + c[None, :], mask=mask, other=0.0).to(ACC)


@triton.jit
def _put(x, value, first, here, head, H, C, c0, L: tl.constexpr, CB: tl.constexpr):
    t = tl.arange(0, L)
    c = c0 + tl.arange(0, CB)
    mask = (t < here)[:, None] & (c < C)[None, :]
    at = x + (first * H + head) * C + (t * (H * C))[:, None] + c[None, :]
    tl.store(at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _tile(x, at, R: tl.constexpr, C: tl.constexpr):
    """Where the (R, C) tile number ``at`` of what goes between kernels lies."""
    return x + at * (R * C) + tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _band(x, at, r0, R: tl.constexpr, RB: tl.constexpr, C: tl.constexpr):
    """Where rows r0 .. r0 + RB of that tile lie."""
    return x + at * (R * C) + (r0 + tl.arange(0, RB))[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def _one(x, first, i, here, head, H, C, c0, CB: tl.constexpr, ACC: tl.constexpr):
    """Token i of a chunk, (1, CB); zero if there is none."""
    c = c0 + tl.arange(0, CB)
    mask = (c < C) & (i + 0 * c < here)  # a mask & a scalar the interpreter gets wrong
    return tl.load(x + ((first + i) * H + head) * C + c, mask=mask, other=0.0).to(ACC)[None, :]


@triton.jit
def _strong_decay(log_w, first, here, head, H, K, L: tl.constexpr, KP: tl.constexpr, ACC: tl.constexpr):
    """Whether some key row of the chunk forgets too much for decays to be split around the middle."""
    total = tl.sum(_tokens(log_w, first, here, head, H, K, 0, L, KP, 0, ACC), 0)
    return tl.min(total, 0) < -_SPLITTABLE


@triton.jit
def _decays(
    log_w, first, here, head, H, K, c0, L: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, STRONG: tl.constexpr
):  # fmt: skip
    """Log decays: from the chunk's start through t, through t - 1, from t + 1 through the end, and of it all (CB,)."""
    each = _tokens(log_w, first, here, head, H, K, c0, L, CB, 0, ACC)
    upto = tl.cumsum(each, 0)
    total = tl.sum(each, 0)
    if STRONG:  # sums of the very steps they mean: differences would lose digits, or be inf - inf
        before = tl.cumsum(_tokens(log_w, first, here, head, H, K, c0, L, CB, -1, ACC), 0)
        after = tl.cumsum(_tokens(log_w, first, here, head, H, K, c0, L, CB, 1, ACC), 0, reverse=True)
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
def _products(
    xb, xk, x, log_w, k, b, first, here, head, H, K, c0,
    L: tl.constexpr, CB: tl.constexpr, STRICT: tl.constexpr, ACC: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """rb and rk (x is r), or ab and ak (x is a, STRICT: before the step, not after), so far summed over key rows before
    c0, with CB more. What is not causal is left to be cut off."""
    upto, before, _, total = _decays(log_w, first, here, head, H, K, c0, L, CB, ACC, False)
    middle = 0.5 * total[None, :]
    up = tl.exp(middle - upto)
    xs = _tokens(x, first, here, head, H, K, c0, L, CB, 0, ACC) * tl.exp((before if STRICT else upto) - middle)
    bs = _tokens(b, first, here, head, H, K, c0, L, CB, 0, ACC) * up
    xb = onto(xb, xs, tl.trans(bs), FINE)
    ks = _tokens(k, first, here, head, H, K, c0, L, CB, 0, ACC) * up
    xk = onto(xk, xs, tl.trans(ks), FINE)
    return xb, xk


@triton.jit
def _products_strong(
    xb, xk, x, log_w, k, b, first, here, head, H, K, c0,
    L: tl.constexpr, CB: tl.constexpr, STRICT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The same for any log_w ≤ 0: column after column, decays as running products of steps."""
    t = tl.arange(0, L)
    xs = _tokens(x, first, here, head, H, K, c0, L, CB, 0, ACC)
    down = tl.zeros([L, CB], ACC)  # D(t, i), or D(t - 1, i)
    for n in range(here):
        i = here - 1 - n
        step = tl.exp(_one(log_w, first, i + 1, here, head, H, K, c0, CB, ACC))
        down = tl.where((t == (i + 1 if STRICT else i))[:, None], 1.0, down * step)
        seen = xs * down
        column = (t == i)[None, :]
        back = _one(b, first, i, here, head, H, K, c0, CB, ACC)
        xb += tl.where(column, tl.sum(seen * back, 1)[:, None], 0.0)
        key = _one(k, first, i, here, head, H, K, c0, CB, ACC)
        xk += tl.where(column, tl.sum(seen * key, 1)[:, None], 0.0)
    return xb, xk


@triton.jit
def _all_products(
    x, log_w, k, b, first, here, head, H, K, L: tl.constexpr, KP: tl.constexpr, CB: tl.constexpr,
    STRICT: tl.constexpr, ACC: tl.constexpr, STRONG: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """rb and rk, or ab and ak."""
    xb = tl.zeros([L, L], ACC)
    xk = tl.zeros([L, L], ACC)
    for c0 in range(0, KP, CB):
        if STRONG:
            xb, xk = _products_strong(xb, xk, x, log_w, k, b, first, here, head, H, K, c0, L, CB, STRICT, ACC)
        else:
            xb, xk = _products(xb, xk, x, log_w, k, b, first, here, head, H, K, c0, L, CB, STRICT, ACC, FINE)
    return _causal(xb, L, STRICT), _causal(xk, L, STRICT)


@triton.jit
def _inverse(n, L: tl.constexpr, FINE: tl.constexpr):
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
        x = onto(x, apart(x, border, FINE), x, FINE, 1)
        size *= 2
    return x


@triton.jit
def _chunk(
    r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CB: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
    STRONG: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    MID: tl.constexpr = read.dtype.element_ty
    ab, ak = _all_products(a, log_w, k, b, first, here, head, H, K, L, KP, CB, True, ACC, STRONG, FINE)
    x = _inverse(ab, L, FINE)
    if KEEP:
        tl.store(_tile(inverse, at, L, L), x.to(MID))
    vs = _tokens(v, first, here, head, H, V, 0, L, VP, 0, ACC)
    u = apart(x, apart(ak, vs, FINE), FINE, 1)
    rb, rk = _all_products(r, log_w, k, b, first, here, head, H, K, L, KP, CB, False, ACC, STRONG, FINE)
    x = x.to(MID)
    tl.store(_tile(add_y, at, L, VP), onto(apart(rk, vs, FINE), rb, u, FINE, 1).to(MID))
    rb = rb.to(MID)
    u = u.to(MID)
    vs = vs.to(MID)
    upto, before, _, total = _decays(log_w, first, here, head, H, K, 0, L, KP, ACC, STRONG)
    as_ = _tokens(a, first, here, head, H, K, 0, L, KP, 0, ACC) * tl.exp(before)
    w = apart(x, as_.to(MID), PRECISION).to(MID)
    rs = _tokens(r, first, here, head, H, K, 0, L, KP, 0, ACC) * tl.exp(upto)
    tl.store(_tile(read, at, L, KP), onto(rs, rb, w, PRECISION).to(MID))
    tl.store(decay + at * KP + tl.arange(0, KP), tl.exp(total))
    for c0 in range(0, KP, CB):
        out = tl.exp(_decays(log_w, first, here, head, H, K, c0, L, CB, ACC, STRONG)[2])
        bs = tl.trans((_tokens(b, first, here, head, H, K, c0, L, CB, 0, ACC) * out).to(MID))
        tl.store(_band(move, at, c0, KP, CB, KP), apart(bs, w, PRECISION).to(MID))
        ks = tl.trans((_tokens(k, first, here, head, H, K, c0, L, CB, 0, ACC) * out).to(MID))
        more = onto(apart(bs, u, PRECISION), ks, vs, PRECISION, 1)
        tl.store(_band(add, at, c0, KP, CB, VP), more.to(MID))


@triton.jit(do_not_specialize=["time"])
def chunk(
    r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """A chunk as an affine map of the state, and as what its tokens read."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    ACC: tl.constexpr = decay.dtype.element_ty
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    here = here.to(tl.int32)
    if here > 0:
        at = slot * H + head
        if _strong_decay(log_w, first, here, head, H, K, L, KP, ACC):
            _chunk(
                r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
                L, KP, VP, CB, KEEP, ACC, True, PRECISION, FINE,
            )  # fmt: skip
        else:
            _chunk(
                r, log_w, k, v, a, b, read, add_y, move, add, decay, inverse, at, first, here, head, H, K, V,
                L, KP, VP, CB, KEEP, ACC, False, PRECISION, FINE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["time", "S"])
def carry(
    move, add, decay, maps, S, time, lengths, cu_seqlens, row_of, H,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What `scan` makes of the state before a segment: `maps` (KP, KP + VP), its matrix and what is added."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row, segment, _, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
    if here > 0:
        chunks = tl.cdiv(here, L)
        first = first_slot(row, time, cu_seqlens, L, RAGGED) + segment * (S // L)
        i = tl.arange(0, KP)
        j = tl.program_id(2) * VB + tl.arange(0, VB)
        added = (j >= KP)[None, :]
        inner = i[:, None] * VP + (j - KP)[None, :]
        across = i[None, :] * KP + i[:, None] if REVERSE else i[:, None] * KP + i[None, :]
        at = (first + chunks - 1 if REVERSE else first) * H + head
        onward = -H if REVERSE else H
        now = tl.where(i[:, None] == j[None, :], 1.0, 0.0).to(maps.dtype.element_ty)
        for _ in range(chunks):
            matrix = tl.load(move + at * (KP * KP) + across)
            more = tl.load(add + at * (KP * VP) + inner, mask=added, other=0.0).to(now.dtype)
            down = tl.load(decay + at * KP + i)
            now = down[:, None] * now + more + dot(matrix, now.to(matrix.dtype), PRECISION)
            at += onward
        tl.store(maps + (slot * H + head) * (KP * (KP + VP)) + i[:, None] * (KP + VP) + j[None, :], now)


@triton.jit(do_not_specialize=["time", "S"])
def pass_on(
    maps, begin, starts, S, time, lengths, cu_seqlens, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr, REVERSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state each segment starts from (REVERSE: the cotangent of the one it ends with), as `begin` is laid out."""
    program = tl.program_id(0).to(tl.int64)
    row = program // H
    head = program % H
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    segments = tl.maximum(tl.cdiv(count, S), 1)
    i = tl.arange(0, KP)
    j = tl.program_id(1) * VB + tl.arange(0, VB)
    live = (i < K)[:, None] & (j < V)[None, :]
    outer = i[:, None] * V + j[None, :]
    now = tl.load(begin + program * (K * V) + outer, mask=live, other=0.0)
    slot = first_slot(row, time, cu_seqlens, S, RAGGED)
    at = (slot + segments - 1 if REVERSE else slot) * H + head
    onward = -H if REVERSE else H
    for n in range(segments):
        tl.store(starts + at * (K * V) + outer, now, mask=live)
        if n + 1 < segments:
            each = maps + at * (KP * (KP + VP)) + i[:, None] * (KP + VP)
            now = tl.load(each + (KP + j)[None, :]) + dot(tl.load(each + i[None, :]), now, PRECISION)
        at += onward


@triton.jit(do_not_specialize=["time", "S"])
def scan(
    move, add, decay, begin, states, end, S, time, lengths, cu_seqlens, row_of, H, K, V,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, VB: tl.constexpr, RAGGED: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S ← (diag(decay) + move) S + add over the chunks of a segment, each S kept before it moves on; `end` is a row's.

    In reverse, with move transposed, from the last chunk to the first: the cotangent of the state each chunk ends with.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row, segment, _, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, S, RAGGED)
    if (here > 0) | (segment == 0):
        _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
        chunks = tl.maximum(tl.cdiv(here, L), 0)
        first = first_slot(row, time, cu_seqlens, L, RAGGED) + segment * (S // L)
        i = tl.arange(0, KP)
        j = tl.program_id(2) * VB + tl.arange(0, VB)
        live = (i < K)[:, None] & (j < V)[None, :]
        outer = i[:, None] * V + j[None, :]
        inner = i[:, None] * VP + j[None, :]
        across = i[None, :] * KP + i[:, None] if REVERSE else i[:, None] * KP + i[None, :]
        now = tl.load(begin + (slot * H + head) * (K * V) + outer, mask=live, other=0.0)
        at = (first + chunks - 1 if REVERSE else first) * H + head
        onward = -H if REVERSE else H
        for _ in range(chunks):
            tl.store(states + at * (KP * VP) + inner, now.to(states.dtype.element_ty))
            matrix = tl.load(move + at * (KP * KP) + across)
            more = tl.load(add + at * (KP * VP) + inner).to(now.dtype)
            down = tl.load(decay + at * KP + i)
            now = down[:, None] * now + more + dot(matrix, now.to(matrix.dtype), PRECISION)
            at += onward
        if (segment == 0) if REVERSE else (count <= (segment + 1) * S):
            tl.store(end + (row * H + head) * (K * V) + outer, now, mask=live)


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
        _put(y, seen + tl.load(_tile(add_y, at, L, VP)), first, here, head, H, V, 0, L, VP)


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
        dy = _tokens(grad_y, first, here, head, H, V, 0, L, VP, 0, seen.dtype)
        tl.store(_tile(add, at, KP, VP), dot(tl.trans(seen), dy, PRECISION).to(seen.dtype))


@triton.jit
def _column(x, i, L: tl.constexpr):
    """Column i of (L, L), as (L, 1)."""
    return tl.sum(tl.where((tl.arange(0, L) == i)[None, :], x, 0.0), 1)[:, None]


@triton.jit
def _grads_strong(
    d_rb, d_rk, d_ab, d_ak, r, log_w, k, a, b, first, here, head, H, K, c0,
    L: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What :func:`_products_strong` gives back to columns of r, a, b, k and log_w."""
    t = tl.arange(0, L)
    rs = _tokens(r, first, here, head, H, K, c0, L, CB, 0, ACC)
    as_ = _tokens(a, first, here, head, H, K, c0, L, CB, 0, ACC)
    d_r = tl.zeros([L, CB], ACC)
    d_a = tl.zeros([L, CB], ACC)
    d_b = tl.zeros([L, CB], ACC)
    d_k = tl.zeros([L, CB], ACC)
    d_w = tl.zeros([L, CB], ACC)
    down_r = tl.zeros([L, CB], ACC)
    down_a = tl.zeros([L, CB], ACC)
    for n in range(here):
        i = here - 1 - n
        step = tl.exp(_one(log_w, first, i + 1, here, head, H, K, c0, CB, ACC))
        down_r = tl.where((t == i)[:, None], 1.0, down_r * step)
        down_a = tl.where((t == i + 1)[:, None], 1.0, down_a * step)
        key = _one(k, first, i, here, head, H, K, c0, CB, ACC)
        back = _one(b, first, i, here, head, H, K, c0, CB, ACC)
        rb = _column(d_rb, i, L)
        rk = _column(d_rk, i, L)
        ab = _column(d_ab, i, L)
        ak = _column(d_ak, i, L)
        r_here = down_r * (rb * back + rk * key)
        a_here = down_a * (ab * back + ak * key)
        d_r += r_here
        d_a += a_here
        row = (t == i)[:, None]
        d_b += tl.where(row, tl.sum(rb * rs * down_r + ab * as_ * down_a, 0)[None, :], 0.0)
        d_k += tl.where(row, tl.sum(rk * rs * down_r + ak * as_ * down_a, 0)[None, :], 0.0)
        # D(t, i) holds the steps after i through t; D(t - 1, i) those through t - 1.
        a_here *= as_
        passed = tl.cumsum(rs * r_here + a_here, 0, reverse=True) - a_here
        d_w += tl.where((t > i)[:, None], passed, 0.0)
    return d_r, d_a, d_b, d_k, d_w


@triton.jit
def _grads_weak(
    d_rb, d_rk, d_ab, d_ak, r, log_w, k, a, b, first, here, head, H, K, c0,
    L: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """What :func:`_products` gives back to columns of r, a, b and k, and what passes over the steps of log_w: of r, b
    and k after a step, of a before it."""
    upto, before, _, total = _decays(log_w, first, here, head, H, K, c0, L, CB, ACC, False)
    middle = 0.5 * total[None, :]
    up = tl.exp(middle - upto)
    down = tl.exp(upto - middle)
    down_a = tl.exp(before - middle)
    rs = _tokens(r, first, here, head, H, K, c0, L, CB, 0, ACC) * down
    as_ = _tokens(a, first, here, head, H, K, c0, L, CB, 0, ACC) * down_a
    bs = _tokens(b, first, here, head, H, K, c0, L, CB, 0, ACC) * up
    d_bs = apart(tl.trans(d_rb), rs, FINE)
    d_bs = onto(d_bs, tl.trans(d_ab), as_, FINE, 1)
    d_rs = apart(d_rb, bs, FINE)
    d_as = apart(d_ab, bs, FINE, 1)
    ks = _tokens(k, first, here, head, H, K, c0, L, CB, 0, ACC) * up
    d_ks = apart(tl.trans(d_rk), rs, FINE)
    d_ks = onto(d_ks, tl.trans(d_ak), as_, FINE, 1)
    d_rs = onto(d_rs, d_rk, ks, FINE)
    d_as = onto(d_as, d_ak, ks, FINE, 1)
    # A difference of sums over pairs of positions: those that do not pass over a step cancel, as the very products
    # are added up on both sides.
    passed = rs * d_rs - bs * d_bs - ks * d_ks
    return d_rs * down, d_as * down_a, d_bs * up, d_ks * up, passed, as_ * d_as


@triton.jit
def _finish(
    d_rs, d_as, d_bs, d_ks, d_ws, passed, passed_a, found, e, vs, dy, r, log_w, k, a, b, states, grad_states,
    d_r, d_w, d_k, d_a, d_b, at, first, here, head, H, K, c0, L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    CB: tl.constexpr, ACC: tl.constexpr, STRONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of five gradients, from those through pairs of positions inside the chunk and what the chunk's ends add.

    log_w of a step is in what passes over it inside the chunk, in what reaches over it from the chunk's start, in what
    does so to its end, and in what goes from start to end.
    """
    upto, before, after, total = _decays(log_w, first, here, head, H, K, c0, L, CB, ACC, STRONG)
    start = tl.load(_band(states, at, c0, KP, CB, VP))
    reach = apart(dy, tl.trans(start), PRECISION) * tl.exp(upto)
    passed += _tokens(r, first, here, head, H, K, c0, L, CB, 0, ACC) * reach
    _put(d_r, d_rs + reach, first, here, head, H, K, c0, L, CB)
    reach = apart(e, tl.trans(start), PRECISION) * tl.exp(before)
    passed_a += _tokens(a, first, here, head, H, K, c0, L, CB, 0, ACC) * reach
    _put(d_a, d_as + reach, first, here, head, H, K, c0, L, CB)
    d_ws += tl.cumsum(passed + passed_a, 0, reverse=True) - passed_a
    out = tl.exp(after)
    pulled = tl.load(_band(grad_states, at, c0, KP, CB, VP))
    reach = apart(found, tl.trans(pulled), PRECISION) * out
    ahead = _tokens(b, first, here, head, H, K, c0, L, CB, 0, ACC) * reach
    _put(d_b, d_bs + reach, first, here, head, H, K, c0, L, CB)
    reach = apart(vs, tl.trans(pulled), PRECISION) * out
    ahead += _tokens(k, first, here, head, H, K, c0, L, CB, 0, ACC) * reach
    _put(d_k, d_ks + reach, first, here, head, H, K, c0, L, CB)
    d_ws += tl.cumsum(ahead, 0) - ahead + (tl.exp(total) * tl.sum(start.to(ACC) * pulled.to(ACC), 1))[None, :]
    _put(d_w, d_ws, first, here, head, H, K, c0, L, CB)


@triton.jit
def _backward(
    r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first, here, head,
    H, K, V, L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr,
    STRONG: tl.constexpr, PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    MID: tl.constexpr = states.dtype.element_ty
    _, ak = _all_products(a, log_w, k, b, first, here, head, H, K, L, KP, CB, True, ACC, STRONG, FINE)
    vs = _tokens(v, first, here, head, H, V, 0, L, VP, 0, ACC)
    found = apart(ak, vs, FINE)
    for c0 in range(0, KP, CB):
        before = _decays(log_w, first, here, head, H, K, c0, L, CB, ACC, STRONG)[1]
        a_in = _tokens(a, first, here, head, H, K, c0, L, CB, 0, ACC) * tl.exp(before)
        found = onto(found, a_in.to(MID), tl.load(_band(states, at, c0, KP, CB, VP)), PRECISION)
    found = apart(tl.load(_tile(inverse, at, L, L)).to(ACC), found, FINE).to(MID)
    ak = ak.to(MID)
    rb, rk = _all_products(r, log_w, k, b, first, here, head, H, K, L, KP, CB, False, ACC, STRONG, FINE)
    dy = _tokens(grad_y, first, here, head, H, V, 0, L, VP, 0, ACC)
    d_found = apart(tl.trans(rb), dy, FINE)
    d_vs = apart(tl.trans(rk.to(MID)), dy.to(MID), PRECISION)
    for c0 in range(0, KP, CB):
        out = tl.exp(_decays(log_w, first, here, head, H, K, c0, L, CB, ACC, STRONG)[2])
        pulled = tl.load(_band(grad_states, at, c0, KP, CB, VP))
        b_out = _tokens(b, first, here, head, H, K, c0, L, CB, 0, ACC) * out
        d_found = onto(d_found, b_out.to(MID), pulled, PRECISION)
        k_out = _tokens(k, first, here, head, H, K, c0, L, CB, 0, ACC) * out
        d_vs = onto(d_vs, k_out.to(MID), pulled, PRECISION)
    x = tl.load(_tile(inverse, at, L, L)).to(ACC)
    e = apart(tl.trans(x), d_found, FINE).to(MID)
    _put(d_v, onto(d_vs, tl.trans(ak), e, PRECISION), first, here, head, H, V, 0, L, VP)

    vs = _tokens(v, first, here, head, H, V, 0, L, VP, 0, MID)
    dy = _tokens(grad_y, first, here, head, H, V, 0, L, VP, 0, MID)
    d_rb = _causal(apart(dy, tl.trans(found), PRECISION), L, False)
    d_rk = _causal(apart(dy, tl.trans(vs), PRECISION, 1), L, False)
    d_ab = _causal(apart(e, tl.trans(found), PRECISION), L, True)
    d_ak = _causal(apart(e, tl.trans(vs), PRECISION, 1), L, True)
    for c0 in range(0, KP, CB):
        if STRONG:
            d_rs, d_as, d_bs, d_ks, d_ws = _grads_strong(
                d_rb, d_rk, d_ab, d_ak, r, log_w, k, a, b, first, here, head, H, K, c0, L, CB, ACC
            )
            passed = tl.zeros([L, CB], ACC)
            passed_a = tl.zeros([L, CB], ACC)
        else:
            d_rs, d_as, d_bs, d_ks, passed, passed_a = _grads_weak(
                d_rb, d_rk, d_ab, d_ak, r, log_w, k, a, b, first, here, head, H, K, c0, L, CB, ACC, FINE
            )
            d_ws = tl.zeros([L, CB], ACC)
        _finish(
            d_rs, d_as, d_bs, d_ks, d_ws, passed, passed_a, found, e, vs, dy, r, log_w, k, a, b, states, grad_states,
            d_r, d_w, d_k, d_a, d_b, at, first, here, head, H, K, c0, L, KP, VP, CB, ACC, STRONG, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["time"])
def backward(
    r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, decay, d_r, d_w, d_k, d_v, d_a, d_b,
    time, lengths, cu_seqlens, row_of,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    L: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
    PRECISION: tl.constexpr, FINE: tl.constexpr,
):  # fmt: skip
    """All six gradients of a chunk, from the state before it and the cotangent of the one after it."""
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    ACC: tl.constexpr = decay.dtype.element_ty
    _, _, first, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    here = here.to(tl.int32)
    if here > 0:
        at = slot * H + head
        if _strong_decay(log_w, first, here, head, H, K, L, KP, ACC):
            _backward(
                r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first,
                here, head, H, K, V, L, KP, VP, CB, ACC, True, PRECISION, FINE,
            )  # fmt: skip
        else:
            _backward(
                r, log_w, k, v, a, b, grad_y, states, grad_states, inverse, d_r, d_w, d_k, d_v, d_a, d_b, at, first,
                here, head, H, K, V, L, KP, VP, CB, ACC, False, PRECISION, FINE,
            )  # fmt: skip
