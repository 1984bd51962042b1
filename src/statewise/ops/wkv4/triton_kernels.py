"""GPU kernels: a program takes a block of tokens, or all blocks of a sequence in turn, and CB channels.

Legend: as in :mod:`statewise.ops.wkv_parts`; a pull is the cotangent of a sum.

    y_t = (num_t e^{top_t} + e^{u+k_t} v_t) / Z_t                Z_t: the same of den_t and 1
    a_t = g_t / Z_t    P_t = Σ_{s>t} e^{(s-1-t) log_w} a_s    Q_t = -Σ_{s>t} e^{(s-1-t) log_w} a_s y_s
    dv_t = e^{u+k_t} a_t + e^{k_t} P_t          dk_t = e^{u+k_t} a_t (v_t - y_t) + e^{k_t} (v_t P_t + Q_t)

P and Q are sums like those of values, from the other end, each term's key being minus the largest exponent in Z_s; the
last state's cotangents are one more term. Σ (s-1-t)·(...) is carried along, since that is what log_w's gradient wants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import first_slot, locate_row, locate_slot
from statewise.ops.wkv_parts import alive, around, bounded, gather, meet, nothing, pick, together, tokens

__all__ = ["backward", "forward", "join", "join_back", "pulls", "sums"]

_BEFORE = tl.constexpr(4)  # what is known of a block's start: num, den, key, far
_BEHIND = tl.constexpr(8)  # and of what pulls at its end: see _chunk_pulls, and the maximum's cotangent


@triton.jit
def _first_sum(num, den, largest, row, C, c, live_c):
    """The state that came, with a key even if it is empty."""
    at = row * C + c
    key = tl.load(largest + at, mask=live_c, other=0.0)
    key = tl.maximum(key, nothing(key))
    return (
        tl.load(num + at, mask=live_c, other=0.0),
        tl.load(den + at, mask=live_c, other=0.0),
        key,
        tl.full(key.shape, 0.0, key.dtype),
    )


@triton.jit
def _read(starts, slot, C, c, live_c):
    at = starts + slot * _BEFORE * C + c
    return (
        tl.load(at, mask=live_c, other=0.0),
        tl.load(at + C, mask=live_c, other=0.0),
        tl.load(at + 2 * C, mask=live_c, other=0.0),
        tl.load(at + 3 * C, mask=live_c, other=0.0),
    )


@triton.jit
def _write(starts, slot, C, c, live_c, num, den, key, far):
    at = starts + slot * _BEFORE * C + c
    tl.store(at, num, mask=live_c)
    tl.store(at + C, den, mask=live_c)
    tl.store(at + 2 * C, key, mask=live_c)
    tl.store(at + 3 * C, far, mask=live_c)


@triton.jit
def _block_sum(k, v, live, here, w, U: tl.constexpr, N: tl.constexpr):
    """Every chunk's sum, and the block's."""
    num, den, key, far = gather(k, v, live, w, False, U)
    weights, _, top, largest = together(key, far, here, w, False, U, N)
    return num, den, key, far, tl.sum(weights * num, 0), tl.sum(weights * den, 0), top, largest


@triton.jit
def _advance(num, den, key, far, here, w, block_num, block_den, block_key, block_far):
    """The sum after a block of ``here`` tokens."""
    old, now, key, far = meet(key, far + here.to(w.dtype) * w, block_key, block_far)
    return num * old + block_num * now, den * old + block_den * now, key, far


@triton.jit
def _emit(
    y, at, first, here, live_c, C, k, v, live, chunk_num, chunk_den, chunk_key, chunk_far, num, den, key, far, w, u,
    U: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The averages of a block that starts from a sum ``(CB,)``."""
    weights, _, top, largest = around(chunk_key, chunk_far, key, far, here, w, False, U, N)
    num, den = pick(weights, chunk_num, num, N), pick(weights, chunk_den, den, N)
    key, far = top, largest
    w = w[None, :]
    for t in tl.static_range(U):
        before, now, _, _ = meet(key, far, k[t], u)
        one = (num * before + v[t] * now) / (den * before + now)
        tl.store(y + at + t * C, one.to(y.dtype.element_ty), mask=(first + t < here)[:, None] & live_c[None, :])
        old, now, key, far = meet(key, far + live[t] * w, k[t], 0.0)
        num = num * old + v[t] * now
        den = den * old + live[t] * now


@triton.jit
def _store_last(num, den, largest, given, row, count, C, c, live_c, end_num, end_den, end_key, end_far):
    at = row * C + c
    tl.store(num + at, end_num, mask=live_c)
    tl.store(den + at, end_den, mask=live_c)
    came = tl.load(given + at, mask=live_c, other=0.0)  # -inf stays -inf where there is no token
    tl.store(largest + at, tl.where(count > 0, end_key + end_far, came), mask=live_c)


@triton.jit(do_not_specialize=["time"])
def forward(
    k, v, log_w, u, num0, den0, max0, starts, y, num1, den1, max1, time, lengths, cu_seqlens, row_of,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, SERIAL: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """SERIAL: from the first state through all blocks of a sequence. Otherwise one block, from what ``starts`` says."""
    L: tl.constexpr = U * N
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
    first = tl.arange(0, N) * U
    if SERIAL:
        row = tl.program_id(0).to(tl.int64)
        start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
        slot = first_slot(row, time, cu_seqlens, L, RAGGED)
        num, den, key, far = _first_sum(num0, den0, max0, row, C, c, live_c)
        for block in range(tl.cdiv(count, L).to(tl.int32)):
            if KEEP:
                _write(starts, slot + block, C, c, live_c, num, den, key, far)
            here = tl.minimum(count - block * L, L).to(tl.int32)
            at = (start + block * L + first)[:, None] * C + c[None, :]
            keys = tokens(k, at, first, here, C, live_c, w, True, U)
            values = tokens(v, at, first, here, C, live_c, w, False, U)
            live = alive(first, here, w, U)
            a, b, d, e, all_num, all_den, all_key, all_far = _block_sum(keys, values, live, here, w, U, N)
            _emit(y, at, first, here, live_c, C, keys, values, live, a, b, d, e, num, den, key, far, w, bonus, U, N)
            num, den, key, far = _advance(num, den, key, far, here, w, all_num, all_den, all_key, all_far)
        _store_last(num1, den1, max1, max0, row, count, C, c, live_c, num, den, key, far)
    else:
        slot = tl.program_id(0).to(tl.int64)
        _row, _block, start, count = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
        if count > 0:
            here = count.to(tl.int32)
            at = (start + first)[:, None] * C + c[None, :]
            keys = tokens(k, at, first, here, C, live_c, w, True, U)
            values = tokens(v, at, first, here, C, live_c, w, False, U)
            live = alive(first, here, w, U)
            num, den, key, far = _read(starts, slot, C, c, live_c)
            a, b, d, e, _, _, _, _ = _block_sum(keys, values, live, here, w, U, N)
            _emit(y, at, first, here, live_c, C, keys, values, live, a, b, d, e, num, den, key, far, w, bonus, U, N)


@triton.jit(do_not_specialize=["time"])
def sums(
    k, v, log_w, starts, time, lengths, cu_seqlens, row_of,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of every block alone."""
    slot = tl.program_id(0).to(tl.int64)
    _row, _block, start, count = locate_slot(slot, time, lengths, cu_seqlens, row_of, U * N, RAGGED)
    if count > 0:
        here = count.to(tl.int32)
        c = tl.program_id(1) * CB + tl.arange(0, CB)
        live_c = c < C
        w = bounded(log_w, c, live_c)
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        keys = tokens(k, at, first, here, C, live_c, w, True, U)
        values = tokens(v, at, first, here, C, live_c, w, False, U)
        live = alive(first, here, w, U)
        _, _, _, _, num, den, key, far = _block_sum(keys, values, live, here, w, U, N)
        _write(starts, slot, C, c, live_c, num, den, key, far)


@triton.jit(do_not_specialize=["time"])
def join(
    log_w, num0, den0, max0, starts, num1, den1, max1, time, lengths, cu_seqlens,
    C: tl.constexpr, L: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums of blocks to what stands before each, and the last state; P blocks are asked for at once."""
    row = tl.program_id(0).to(tl.int64)
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, L, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    num, den, key, far = _first_sum(num0, den0, max0, row, C, c, live_c)
    blocks = tl.cdiv(count, L).to(tl.int32)
    for group in range(tl.cdiv(blocks, P)):
        found = ()
        for i in tl.static_range(P):
            block = group * P + i
            found = found + (_read(starts, slot + block, C, c, c < tl.where(blocks > block, C, 0)),)
        for i in tl.static_range(P):
            block = group * P + i
            if blocks > block:
                _write(starts, slot + block, C, c, live_c, num, den, key, far)
                here = tl.minimum(count - block * L, L)
                all_num, all_den, all_key, all_far = found[i]
                num, den, key, far = _advance(num, den, key, far, here, w, all_num, all_den, all_key, all_far)
    _store_last(num1, den1, max1, max0, row, count, C, c, live_c, num, den, key, far)


@triton.jit
def _replay(
    k, v, g, live, chunk_num, chunk_den, chunk_key, chunk_far, num, den, key, far, here, w, u,
    U: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Of all tokens: a and y; minus the largest exponent in Z, as a pair; what pulls at their value directly; and who
    is the maximum after them: 0 who was before, 1 both alike, a large number they themselves."""
    weights, _, top, largest = around(chunk_key, chunk_far, key, far, here, w, False, U, N)
    num, den = pick(weights, chunk_num, num, N), pick(weights, chunk_den, den, N)
    key, far = top, largest
    w = w[None, :]
    pulls = ()
    averages = ()
    keys = ()
    fars = ()
    direct = ()
    losses = ()
    for t in tl.static_range(U):
        before, now, z_key, z_far = meet(key, far, k[t], u)
        total = den * before + now
        y = (num * before + v[t] * now) / total  # divided as the first average is: where that outweighs, they are equal
        there = live[t] > 0.0
        a = tl.where(there, g[t] / total, 0.0)
        pulls = pulls + (a,)
        averages = averages + (tl.where(there, y, 0.0),)
        keys = keys + (tl.where(there, -z_key, nothing(a)),)
        fars = fars + (-z_far,)
        direct = direct + (a * now,)
        far += live[t] * w
        lead = (key - k[t]) + far
        losses = losses + (tl.where(lead > 0.0, 0.0, tl.where(lead == 0.0, 1.0, 10000.0)) * live[t],)
        old, now, key, far = meet(key, far, k[t], 0.0)
        num = num * old + v[t] * now
        den = den * old + live[t] * now
    return pulls, averages, keys, fars, direct, losses


@triton.jit
def _chunk_pulls(a, y, keys, fars, losses, live, average, w, U: tl.constexpr):
    """Σ of a, -a y and a (average - y), each with e^{steps·log_w}; the first two once more with the number of steps;
    the exponent as a pair; who lost the maximum."""
    one = tl.full(a[0].shape, 0.0, a[0].dtype)
    two, three, far_one, far_two, far, loss = one, one, one, one, one, one
    key = nothing(one)
    for t in tl.static_range(U - 1, -1, -1):
        old, now, key, far = meet(key, far + live[t] * w, keys[t], fars[t])
        far_one = (far_one + live[t] * one) * old
        far_two = (far_two + live[t] * two) * old
        pull = a[t] * now
        one = one * old + pull
        two = two * old - pull * y[t]
        three = three * old + pull * (average - y[t])
        loss += losses[t]
    return one, two, three, far_one, far_two, key, far, loss


@triton.jit
def _average(num, den):
    return tl.where(den == 0.0, 0.0, num / tl.where(den == 0.0, 1.0, den))


@triton.jit
def _prepare(
    k, v, grad_y, at, first, here, C, live_c, live, num, den, key, far, average, w, u,
    U: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What backward knows of a block before it knows what pulls at its end: its tokens, _replay's and _chunk_pulls'."""
    keys = tokens(k, at, first, here, C, live_c, w, True, U)
    values = tokens(v, at, first, here, C, live_c, w, False, U)
    g = tokens(grad_y, at, first, here, C, live_c, w, False, U)
    chunk_num, chunk_den, chunk_key, chunk_far = gather(keys, values, live, w, False, U)
    a, y, z_keys, z_fars, direct, losses = _replay(
        keys, values, g, live, chunk_num, chunk_den, chunk_key, chunk_far, num, den, key, far, here, w, u, U, N
    )
    pulled = _chunk_pulls(a, y, z_keys, z_fars, losses, live, average[None, :], w[None, :], U)
    return keys, values, a, y, z_keys, z_fars, direct, losses, pulled


@triton.jit
def _block_pulls(pulled, here, w, U: tl.constexpr, N: tl.constexpr):
    """What a block's own tokens pull with at what stands before it."""
    one, two, three, far_one, far_two, key, far, loss = pulled
    weights, steps, top, largest = together(key, far, here, w, True, U, N)
    return (
        tl.sum(weights * one, 0),
        tl.sum(weights * two, 0),
        tl.sum(weights * three, 0),
        tl.sum(weights * (far_one + steps * one), 0),
        tl.sum(weights * (far_two + steps * two), 0),
        top,
        largest,
        tl.sum(loss, 0),
    )


@triton.jit
def _retreat(one, two, three, far_one, far_two, key, far, top, here, w, block):
    """What pulls before a block of ``here`` tokens; ``top`` is the maximum's cotangent."""
    steps = here.to(w.dtype)
    old, now, key, far = meet(key, far + steps * w, block[5], block[6])
    far_one = (far_one + steps * one) * old + block[3] * now
    far_two = (far_two + steps * two) * old + block[4] * now
    return (
        one * old + block[0] * now,
        two * old + block[1] * now,
        three * old + block[2] * now,
        far_one,
        far_two,
        key,
        far,
        top * tl.exp2(-block[7]),
    )


@triton.jit
def _read_pulls(behind, slot, C, c, live_c):
    at = behind + slot * _BEHIND * C + c
    found = ()
    for i in tl.static_range(_BEHIND):
        found = found + (tl.load(at + i * C, mask=live_c, other=0.0),)
    return found


@triton.jit
def _write_pulls(behind, slot, C, c, live_c, found):
    at = behind + slot * _BEHIND * C + c
    for i in tl.static_range(_BEHIND):
        tl.store(at + i * C, found[i], mask=live_c)


@triton.jit
def _last_pulls(num1, den1, max1, g_num1, g_den1, g_max1, row, count, C, c, live_c, average):
    """The last state's cotangents as a pull; the maximum is what the sums are told relative to."""
    at = row * C + c
    one = tl.load(g_num1 + at, mask=live_c, other=0.0)
    two = tl.load(g_den1 + at, mask=live_c, other=0.0)
    top = tl.load(g_max1 + at, mask=live_c, other=0.0)
    key = tl.load(max1 + at, mask=live_c, other=0.0)
    if count > 0:
        top -= one * tl.load(num1 + at, mask=live_c, other=0.0) + two * tl.load(den1 + at, mask=live_c, other=0.0)
    else:
        key = tl.full(key.shape, 0.0, key.dtype)  # it may be -inf, and nothing asks
    blank = tl.full(one.shape, 0.0, one.dtype)
    return one, two, one * average + two, blank, blank, -key, blank, top


@triton.jit
def _store_first(
    d_num0, d_den0, d_max0, num0, den0, max0, row, count, C, c, live_c, one, two, three, far_one, far_two, key, far, top
):  # fmt: skip
    """Gradients of the first state; returns log_w's through it."""
    at = row * C + c
    num, den, largest, _ = _first_sum(num0, den0, max0, row, C, c, live_c)
    size = tl.exp((largest + key) + far)
    size = tl.where(count > 0, size, 1.0)
    tl.store(d_num0 + at, size * one, mask=live_c)
    tl.store(d_den0 + at, size * two, mask=live_c)
    # Relative to the first average: where either side outweighs the other, this is what is left of terms that cancel.
    tl.store(d_max0 + at, tl.where(count > 0, size * den * three + top, top), mask=live_c)
    return tl.where(count > 0, size * (num * far_one + den * far_two), 0.0)


@triton.jit
def _grads(
    d_k, d_v, at, first, here, C, live_c, live, k, v, a, y, z_keys, z_fars, direct, losses, pulled,
    one, two, far_one, far_two, key, far, top, w, grad_w, grad_u,
    U: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of a block's tokens, given what pulls at its end ``(CB,)``; returns log_w's and u's, added."""
    chunk_one, chunk_two, _, chunk_far_one, chunk_far_two, chunk_key, chunk_far, chunk_loss = pulled
    weights, steps, lead, largest = around(chunk_key, chunk_far, key, far, here, w, True, U, N)
    far_one = pick(weights, chunk_far_one, far_one, N) + pick(weights * steps, chunk_one, one, N)
    far_two = pick(weights, chunk_far_two, far_two, N) + pick(weights * steps, chunk_two, two, N)
    one, two = pick(weights, chunk_one, one, N), pick(weights, chunk_two, two, N)
    key, far = lead, largest
    i, j = tl.arange(0, N)[:, None, None], tl.arange(0, N)[None, :, None]
    top = top[None, :] * tl.exp2(-tl.sum(tl.where(i > j, chunk_loss[:, None, :], 0.0), 0))
    w = w[None, :]
    for t in tl.static_range(U - 1, -1, -1):
        mask = (first + t < here)[:, None] & live_c[None, :]
        later = tl.exp((k[t] + key) + far)
        own = direct[t] * (v[t] - y[t])
        fresh = tl.where(losses[t] > 1.0, 1.0, 0.5 * losses[t])
        taken = fresh * top  # the maximum was this key, or what the key before left of it
        top -= taken
        grad = own + later * (v[t] * one + two) + taken
        tl.store(d_k + at + t * C, grad.to(d_k.dtype.element_ty), mask=mask)
        tl.store(d_v + at + t * C, (direct[t] + later * one).to(d_v.dtype.element_ty), mask=mask)
        grad_u += own
        grad_w += live[t] * (later * (v[t] * far_one + far_two) + top)
        old, now, key, far = meet(key, far + live[t] * w, z_keys[t], z_fars[t])
        far_one = (far_one + live[t] * one) * old
        far_two = (far_two + live[t] * two) * old
        one = one * old + a[t] * now
        two = two * old - a[t] * now * y[t]
    return grad_w, grad_u


@triton.jit(do_not_specialize=["time"])
def backward(
    k, v, log_w, u, num0, den0, max0, starts, behind, num1, den1, max1, grad_y, g_num1, g_den1, g_max1,
    d_k, d_v, d_log_w, d_u, d_num0, d_den0, d_max0, time, lengths, cu_seqlens, row_of,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, SERIAL: tl.constexpr,
):  # fmt: skip
    """SERIAL: back through all blocks of a sequence. Otherwise one block, ``behind`` says what pulls at its end."""
    L: tl.constexpr = U * N
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
    first = tl.arange(0, N) * U
    grad_w = tl.zeros([N, CB], w.dtype)
    grad_u = tl.zeros([N, CB], w.dtype)
    if SERIAL:
        row = tl.program_id(0).to(tl.int64)
        start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
        slot = first_slot(row, time, cu_seqlens, L, RAGGED)
        first_num, first_den, _, _ = _first_sum(num0, den0, max0, row, C, c, live_c)
        average = _average(first_num, first_den)
        one, two, three, far_one, far_two, back_key, back_far, top = _last_pulls(
            num1, den1, max1, g_num1, g_den1, g_max1, row, count, C, c, live_c, average
        )
        blocks = tl.cdiv(count, L).to(tl.int32)
        for step in range(blocks):
            block = blocks - 1 - step
            here = tl.minimum(count - block * L, L).to(tl.int32)
            at = (start + block * L + first)[:, None] * C + c[None, :]
            live = alive(first, here, w, U)
            num, den, key, far = _read(starts, slot + block, C, c, live_c)
            keys, values, a, y, z_keys, z_fars, direct, losses, pulled = _prepare(
                k, v, grad_y, at, first, here, C, live_c, live, num, den, key, far, average, w, bonus, U, N
            )
            grad_w, grad_u = _grads(
                d_k, d_v, at, first, here, C, live_c, live, keys, values, a, y, z_keys, z_fars, direct, losses, pulled,
                one, two, far_one, far_two, back_key, back_far, top, w, grad_w, grad_u, U, N,
            )  # fmt: skip
            own = _block_pulls(pulled, here, w, U, N)
            one, two, three, far_one, far_two, back_key, back_far, top = _retreat(
                one, two, three, far_one, far_two, back_key, back_far, top, here, w, own
            )
        through = _store_first(
            d_num0, d_den0, d_max0, num0, den0, max0, row, count, C, c, live_c,
            one, two, three, far_one, far_two, back_key, back_far, top,
        )  # fmt: skip
        tl.store(d_log_w + row * C + c, tl.sum(grad_w, 0) + through, mask=live_c)
        tl.store(d_u + row * C + c, tl.sum(grad_u, 0), mask=live_c)
    else:
        slot = tl.program_id(0).to(tl.int64)
        _row, _block, start, count = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
        if count > 0:
            here = count.to(tl.int32)
            at = (start + first)[:, None] * C + c[None, :]
            live = alive(first, here, w, U)
            num, den, key, far = _read(starts, slot, C, c, live_c)
            one, two, three, far_one, far_two, back_key, back_far, top = _read_pulls(behind, slot, C, c, live_c)
            average = tl.full(one.shape, 0.0, one.dtype)  # only the first state's gradients ask for it
            keys, values, a, y, z_keys, z_fars, direct, losses, pulled = _prepare(
                k, v, grad_y, at, first, here, C, live_c, live, num, den, key, far, average, w, bonus, U, N
            )
            grad_w, grad_u = _grads(
                d_k, d_v, at, first, here, C, live_c, live, keys, values, a, y, z_keys, z_fars, direct, losses, pulled,
                one, two, far_one, far_two, back_key, back_far, top, w, grad_w, grad_u, U, N,
            )  # fmt: skip
        tl.store(d_log_w + slot * C + c, tl.sum(grad_w, 0), mask=live_c)
        tl.store(d_u + slot * C + c, tl.sum(grad_u, 0), mask=live_c)


@triton.jit(do_not_specialize=["time"])
def pulls(
    k, v, log_w, u, num0, den0, max0, starts, behind, grad_y, time, lengths, cu_seqlens, row_of,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of every block alone."""
    slot = tl.program_id(0).to(tl.int64)
    row, _block, start, count = locate_slot(slot, time, lengths, cu_seqlens, row_of, U * N, RAGGED)
    if count > 0:
        here = count.to(tl.int32)
        c = tl.program_id(1) * CB + tl.arange(0, CB)
        live_c = c < C
        w = bounded(log_w, c, live_c)
        bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        first_num, first_den, _, _ = _first_sum(num0, den0, max0, row, C, c, live_c)
        num, den, key, far = _read(starts, slot, C, c, live_c)
        live = alive(first, here, w, U)
        average = _average(first_num, first_den)
        _, _, _, _, _, _, _, _, pulled = _prepare(
            k, v, grad_y, at, first, here, C, live_c, live, num, den, key, far, average, w, bonus, U, N
        )
        _write_pulls(behind, slot, C, c, live_c, _block_pulls(pulled, here, w, U, N))


@triton.jit(do_not_specialize=["time"])
def join_back(
    log_w, num0, den0, max0, behind, num1, den1, max1, g_num1, g_den1, g_max1, d_log_w, d_num0, d_den0, d_max0,
    time, lengths, cu_seqlens,
    C: tl.constexpr, L: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Pulls of blocks to what pulls at the end of each, and the gradients of the first state."""
    row = tl.program_id(0).to(tl.int64)
    _, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    slot = first_slot(row, time, cu_seqlens, L, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    first_num, first_den, _, _ = _first_sum(num0, den0, max0, row, C, c, live_c)
    one, two, three, far_one, far_two, key, far, top = _last_pulls(
        num1, den1, max1, g_num1, g_den1, g_max1, row, count, C, c, live_c, _average(first_num, first_den)
    )
    blocks = tl.cdiv(count, L).to(tl.int32)
    for group in range(tl.cdiv(blocks, P)):
        found = ()
        for i in tl.static_range(P):
            block = blocks - 1 - group * P - i
            found = found + (_read_pulls(behind, slot + block, C, c, c < tl.where(block >= 0, C, 0)),)
        for i in tl.static_range(P):
            block = blocks - 1 - group * P - i
            if block >= 0:
                pulling = (one, two, three, far_one, far_two, key, far, top)
                _write_pulls(behind, slot + block, C, c, live_c, pulling)
                here = tl.minimum(count - block * L, L)
                one, two, three, far_one, far_two, key, far, top = _retreat(
                    one, two, three, far_one, far_two, key, far, top, here, w, found[i]
                )
    through = _store_first(
        d_num0, d_den0, d_max0, num0, den0, max0, row, count, C, c, live_c,
        one, two, three, far_one, far_two, key, far, top,
    )  # fmt: skip
    tl.store(d_log_w + row * C + c, through, mask=live_c)
