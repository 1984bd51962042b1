"""GPU kernels: a program takes a block of tokens, or a short sequence WHOLE, and CB channels.

Legend: as in :mod:`statewise.ops.wkv_parts`; a pull is the cotangent of a sum, left is before and right behind a token.

    y_t = (left_t + right_t + e^{u+k_t} v_t) / Z_t      Z_t: the same with 1 for v      a_t = g_t / Z_t
    P_t = Σ_{s≠t} e^{(|s-t|-1) log_w} a_s               Q_t = -Σ_{s≠t} e^{(|s-t|-1) log_w} a_s y_s
    dv_t = e^{u+k_t} a_t + e^{k_t} P_t                  dk_t = e^{u+k_t} a_t (v_t - y_t) + e^{k_t} (v_t P_t + Q_t)

P and Q are sums from both sides like those of values, each term's key being minus the largest exponent in Z_s. Each is
carried once more with |s-t|-1 as a factor, since that is what log_w's gradient wants. Averages move with their values,
so backward tells values relative to the sequence's first average: where one token outweighs all others, gradients do
not drown in terms that cancel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from statewise.ops.triton_parts import locate_slot
from statewise.ops.wkv_parts import alive, around, bounded, gather, meet, nothing, pick, together, tokens

__all__ = ["backward", "forward", "join", "join_pulls", "pulls", "sums"]


@triton.jit
def _read(at, step, live_c, COUNT: tl.constexpr):
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(at + i * step, mask=live_c, other=0.0),)
    return found


@triton.jit
def _write(at, step, live_c, numbers, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(at + i * step, numbers[i], mask=live_c)


@triton.jit
def _no_sum(w):
    blank = tl.full(w.shape, 0.0, w.dtype)
    return blank, blank, nothing(blank), blank


@triton.jit
def _no_pull(w):
    blank = tl.full(w.shape, 0.0, w.dtype)
    return blank, blank, blank, blank, nothing(blank), blank


@triton.jit
def _block_sum(num, den, key, far, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    """Chunks' sums as one, as the neighbour of the block sees it."""
    weights, _, top, largest = together(key, far, here, w, RIGHT, U, N)
    return tl.sum(weights * num, 0), tl.sum(weights * den, 0), top, largest


@triton.jit
def _at_chunks(sums, came, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    """What stands before every chunk (RIGHT: behind), of chunks' sums and what came to the block."""
    weights, _, top, largest = around(sums[2], sums[3], came[2], came[3], here, w, RIGHT, U, N)
    return pick(weights, sums[0], came[0], N), pick(weights, sums[1], came[1], N), top, largest


@triton.jit
def _pulls_at_chunks(pulled, came, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    weights, steps, top, largest = around(pulled[4], pulled[5], came[4], came[5], here, w, RIGHT, U, N)
    far = weights * steps
    return (
        pick(weights, pulled[0], came[0], N),
        pick(weights, pulled[1], came[1], N),
        pick(weights, pulled[2], came[2], N) + pick(far, pulled[0], came[0], N),
        pick(weights, pulled[3], came[3], N) + pick(far, pulled[1], came[1], N),
        top,
        largest,
    )


@triton.jit
def _block_pull(pulled, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    weights, steps, top, largest = together(pulled[4], pulled[5], here, w, RIGHT, U, N)
    return (
        tl.sum(weights * pulled[0], 0),
        tl.sum(weights * pulled[1], 0),
        tl.sum(weights * (pulled[2] + steps * pulled[0]), 0),
        tl.sum(weights * (pulled[3] + steps * pulled[1]), 0),
        top,
        largest,
    )


@triton.jit
def _averages(k, v, live, left, right, w, u, U: tl.constexpr):
    """Of all tokens, given what stands on both sides of their chunk: the average and one over Z; the largest exponent
    in Z, as a pair; the weight of the token itself."""
    w = w[None, :]
    nums = ()
    dens = ()
    keys = ()
    fars = ()
    num, den, key, far = right
    for t in tl.static_range(U - 1, -1, -1):  # what stands behind each token, the last first
        nums = nums + (num,)
        dens = dens + (den,)
        keys = keys + (key,)
        fars = fars + (far,)
        old, now, key, far = meet(key, far + live[t] * w, k[t], 0.0)
        num = num * old + v[t] * now
        den = den * old + live[t] * now
    num, den, key, far = left
    averages = ()
    inverses = ()
    z_keys = ()
    z_fars = ()
    owns = ()
    for t in tl.static_range(U):
        before, behind, side_key, side_far = meet(key, far, keys[U - 1 - t], fars[U - 1 - t])
        sides, own, z_key, z_far = meet(side_key, side_far, k[t], u)
        before = before * sides
        behind = behind * sides
        inverse = 1.0 / (before * den + behind * dens[U - 1 - t] + own)
        averages = averages + ((before * num + behind * nums[U - 1 - t] + own * v[t]) * inverse,)
        inverses = inverses + (inverse,)
        z_keys = z_keys + (z_key,)
        z_fars = z_fars + (z_far,)
        owns = owns + (own,)
        old, now, key, far = meet(key, far + live[t] * w, k[t], 0.0)
        num = num * old + v[t] * now
        den = den * old + live[t] * now
    return averages, inverses, z_keys, z_fars, owns


@triton.jit
def _place(time, lengths, WHOLE: tl.constexpr, L: tl.constexpr, RAGGED: tl.constexpr):
    """The program's slot and row, its first token among all, and how many tokens it has."""
    slot = tl.program_id(0).to(tl.int64)
    if WHOLE:
        row, start, count = slot, slot * time, tl.cast(time, tl.int64)
        if RAGGED:
            count = tl.load(lengths + row).to(tl.int64)
        block = slot * 0
    else:
        row, block, start, count = locate_slot(slot, time, lengths, None, None, L, RAGGED)
    return slot, row, block, start, tl.minimum(count, L).to(tl.int32)


@triton.jit(do_not_specialize=["time"])
def forward(
    k, v, log_w, u, edges, first_y, y, time, lengths,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, WHOLE: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    slot, row, block, start, here = _place(time, lengths, WHOLE, U * N, RAGGED)
    if here > 0:
        c = tl.program_id(1) * CB + tl.arange(0, CB)
        live_c = c < C
        w = bounded(log_w, c, live_c)
        bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        keys = tokens(k, at, first, here, C, live_c, w, True, U)
        values = tokens(v, at, first, here, C, live_c, w, False, U)
        live = alive(first, here, w, U)
        if WHOLE:
            from_left = _no_sum(w)
            from_right = _no_sum(w)
        else:
            from_left = _read(edges + slot * 8 * C + c, C, live_c, 4)
            from_right = _read(edges + (slot * 8 + 4) * C + c, C, live_c, 4)
        left = _at_chunks(gather(keys, values, live, w, False, U), from_left, here, w, False, U, N)
        right = _at_chunks(gather(keys, values, live, w, True, U), from_right, here, w, True, U, N)
        averages, _, _, _, _ = _averages(keys, values, live, left, right, w, bonus, U)
        for t in tl.static_range(U):
            mask = (first + t < here)[:, None] & live_c[None, :]
            tl.store(y + at + t * C, averages[t].to(y.dtype.element_ty), mask=mask)
        if KEEP:
            there = first_y + row * C + c[None, :] + first[:, None]
            tl.store(there, averages[0], mask=(first + block == 0)[:, None] & live_c[None, :])


@triton.jit(do_not_specialize=["time"])
def sums(
    k, v, log_w, edges, time, lengths,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of every block alone, as its right and as its left neighbour sees it."""
    slot, _row, _block, start, here = _place(time, lengths, False, U * N, RAGGED)
    if here > 0:
        c = tl.program_id(1) * CB + tl.arange(0, CB)
        live_c = c < C
        w = bounded(log_w, c, live_c)
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        keys = tokens(k, at, first, here, C, live_c, w, True, U)
        values = tokens(v, at, first, here, C, live_c, w, False, U)
        live = alive(first, here, w, U)
        num, den, key, far = gather(keys, values, live, w, False, U)
        left = _block_sum(num, den, key, far, here, w, False, U, N)
        num, den, key, far = gather(keys, values, live, w, True, U)
        right = _block_sum(num, den, key, far, here, w, True, U, N)
        _write(edges + slot * 8 * C + c, C, live_c, left, 4)
        _write(edges + (slot * 8 + 4) * C + c, C, live_c, right, 4)


@triton.jit(do_not_specialize=["time"])
def join(
    log_w, edges, time, lengths,
    C: tl.constexpr, L: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums of blocks to what stands on either side of each; a program takes one side, and asks for P blocks at once."""
    row = tl.program_id(0).to(tl.int64)
    side = tl.program_id(2)
    if RAGGED:
        count = tl.load(lengths + row).to(tl.int64)
    else:
        count = tl.cast(time, tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    base = edges + (row * tl.cdiv(time, L) * 8 + side * 4) * C + c
    num, den, key, far = _no_sum(w)
    blocks = tl.cdiv(count, L).to(tl.int32)
    for group in range(tl.cdiv(blocks, P)):
        found = ()
        for i in tl.static_range(P):
            turn = group * P + i
            block = tl.where(side == 0, turn, blocks - 1 - turn)
            found = found + (_read(base + block * 8 * C, C, c < tl.where(blocks > turn, C, 0), 4),)
        for i in tl.static_range(P):
            turn = group * P + i
            if blocks > turn:
                block = tl.where(side == 0, turn, blocks - 1 - turn)
                _write(base + block * 8 * C, C, live_c, (num, den, key, far), 4)
                steps = tl.minimum(count - block * L, L).to(w.dtype)
                old, now, key, far = meet(key, far + steps * w, found[i][2], found[i][3])
                num = num * old + found[i][0] * now
                den = den * old + found[i][1] * now


@triton.jit
def _chunk_pull(a, y, keys, fars, live, w, RIGHT: tl.constexpr, U: tl.constexpr):
    """Σ of a and -a y, each with e^{steps·log_w}, and once more with the number of steps; the exponent as a pair."""
    w = w[None, :]
    one = tl.full(a[0].shape, 0.0, a[0].dtype)
    two, far_one, far_two, far = one, one, one, one
    key = nothing(one)
    for t in tl.static_range(U - 1 if RIGHT else 0, -1 if RIGHT else U, -1 if RIGHT else 1):
        old, now, key, far = meet(key, far + live[t] * w, keys[t], fars[t])
        far_one = (far_one + live[t] * one) * old
        far_two = (far_two + live[t] * two) * old
        one = one * old + a[t] * now
        two = two * old - a[t] * now * y[t]
    return one, two, far_one, far_two, key, far


@triton.jit
def _prepare(
    k, v, grad_y, edges, center, slot, at, first, here, C, c, live_c, live, w, u,
    U: tl.constexpr, N: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """What backward knows of a block before it knows what pulls from outside: keys of all tokens, values relative to
    ``center``, a and y, minus the largest exponent in Z as a pair, and what pulls at their values directly."""
    keys = tokens(k, at, first, here, C, live_c, w, True, U)
    given = tokens(v, at, first, here, C, live_c, w, False, U)
    g = tokens(grad_y, at, first, here, C, live_c, w, False, U)
    values = ()
    for t in tl.static_range(U):
        values = values + (live[t] * (given[t] - center[None, :]),)
    if WHOLE:
        from_left = _no_sum(w)
        from_right = _no_sum(w)
    else:
        num, den, key, far = _read(edges + slot * 8 * C + c, C, live_c, 4)
        from_left = (num - center * den, den, key, far)
        num, den, key, far = _read(edges + (slot * 8 + 4) * C + c, C, live_c, 4)
        from_right = (num - center * den, den, key, far)
    left = _at_chunks(gather(keys, values, live, w, False, U), from_left, here, w, False, U, N)
    right = _at_chunks(gather(keys, values, live, w, True, U), from_right, here, w, True, U, N)
    averages, inverses, z_keys, z_fars, owns = _averages(keys, values, live, left, right, w, u, U)
    a = ()
    y = ()
    pull_keys = ()
    pull_fars = ()
    direct = ()
    for t in tl.static_range(U):
        there = live[t] > 0.0
        pull = tl.where(there, g[t] * inverses[t], 0.0)
        a = a + (pull,)
        y = y + (tl.where(there, averages[t], 0.0),)
        pull_keys = pull_keys + (tl.where(there, -z_keys[t], nothing(pull)),)
        pull_fars = pull_fars + (-z_fars[t],)
        direct = direct + (pull * owns[t],)
    return keys, values, a, y, pull_keys, pull_fars, direct


@triton.jit(do_not_specialize=["time"])
def backward(
    k, v, log_w, u, edges, first_y, behind, grad_y, d_k, d_v, d_log_w, d_u, time, lengths,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    slot, row, _block, start, here = _place(time, lengths, WHOLE, U * N, RAGGED)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    grad_w = tl.zeros([N, CB], w.dtype)
    grad_u = tl.zeros([N, CB], w.dtype)
    if here > 0:
        bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
        center = tl.load(first_y + row * C + c, mask=live_c, other=0.0)
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        live = alive(first, here, w, U)
        keys, values, a, y, pull_keys, pull_fars, direct = _prepare(
            k, v, grad_y, edges, center, slot, at, first, here, C, c, live_c, live, w, bonus, U, N, WHOLE
        )
        if WHOLE:
            from_left = _no_pull(w)
            from_right = _no_pull(w)
        else:
            from_left = _read(behind + slot * 12 * C + c, C, live_c, 6)
            from_right = _read(behind + (slot * 12 + 6) * C + c, C, live_c, 6)
        pulled = _chunk_pull(a, y, pull_keys, pull_fars, live, w, True, U)
        one, two, far_one, far_two, key, far = _pulls_at_chunks(pulled, from_right, here, w, True, U, N)
        # From the right first: what it pulls at each token's value, and at its weight besides.
        ones = ()
        twos = ()
        for t in tl.static_range(U - 1, -1, -1):
            size = tl.exp((keys[t] + key) + far)
            ones = ones + (size * one,)
            twos = twos + (size * two,)
            grad_w += live[t] * size * (values[t] * far_one + far_two)
            old, now, key, far = meet(key, far + live[t] * w[None, :], pull_keys[t], pull_fars[t])
            far_one = (far_one + live[t] * one) * old
            far_two = (far_two + live[t] * two) * old
            one = one * old + a[t] * now
            two = two * old - a[t] * now * y[t]
        pulled = _chunk_pull(a, y, pull_keys, pull_fars, live, w, False, U)
        one, two, far_one, far_two, key, far = _pulls_at_chunks(pulled, from_left, here, w, False, U, N)
        for t in tl.static_range(U):
            mask = (first + t < here)[:, None] & live_c[None, :]
            size = tl.exp((keys[t] + key) + far)
            to_num = ones[U - 1 - t] + size * one
            to_den = twos[U - 1 - t] + size * two
            own = direct[t] * (values[t] - y[t])
            tl.store(d_v + at + t * C, (direct[t] + to_num).to(d_v.dtype.element_ty), mask=mask)
            tl.store(d_k + at + t * C, (own + (values[t] * to_num + to_den)).to(d_k.dtype.element_ty), mask=mask)
            grad_u += own
            grad_w += live[t] * size * (values[t] * far_one + far_two)
            old, now, key, far = meet(key, far + live[t] * w[None, :], pull_keys[t], pull_fars[t])
            far_one = (far_one + live[t] * one) * old
            far_two = (far_two + live[t] * two) * old
            one = one * old + a[t] * now
            two = two * old - a[t] * now * y[t]
    tl.store(d_log_w + slot * C + c, tl.sum(grad_w, 0), mask=live_c)
    tl.store(d_u + slot * C + c, tl.sum(grad_u, 0), mask=live_c)


@triton.jit(do_not_specialize=["time"])
def pulls(
    k, v, log_w, u, edges, first_y, behind, grad_y, time, lengths,
    C: tl.constexpr, U: tl.constexpr, N: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Of every block alone, to its right and to its left."""
    slot, row, _block, start, here = _place(time, lengths, False, U * N, RAGGED)
    if here > 0:
        c = tl.program_id(1) * CB + tl.arange(0, CB)
        live_c = c < C
        w = bounded(log_w, c, live_c)
        bonus = tl.load(u + c, mask=live_c, other=0.0)[None, :]
        center = tl.load(first_y + row * C + c, mask=live_c, other=0.0)
        first = tl.arange(0, N) * U
        at = (start + first)[:, None] * C + c[None, :]
        live = alive(first, here, w, U)
        _keys, _values, a, y, pull_keys, pull_fars, _direct = _prepare(
            k, v, grad_y, edges, center, slot, at, first, here, C, c, live_c, live, w, bonus, U, N, False
        )
        left = _block_pull(_chunk_pull(a, y, pull_keys, pull_fars, live, w, False, U), here, w, False, U, N)
        right = _block_pull(_chunk_pull(a, y, pull_keys, pull_fars, live, w, True, U), here, w, True, U, N)
        _write(behind + slot * 12 * C + c, C, live_c, left, 6)
        _write(behind + (slot * 12 + 6) * C + c, C, live_c, right, 6)


@triton.jit(do_not_specialize=["time"])
def join_pulls(
    log_w, behind, time, lengths,
    C: tl.constexpr, L: tl.constexpr, CB: tl.constexpr, RAGGED: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Pulls of blocks to what pulls from either side of each; a program takes one side."""
    row = tl.program_id(0).to(tl.int64)
    side = tl.program_id(2)
    if RAGGED:
        count = tl.load(lengths + row).to(tl.int64)
    else:
        count = tl.cast(time, tl.int64)
    c = tl.program_id(1) * CB + tl.arange(0, CB)
    live_c = c < C
    w = bounded(log_w, c, live_c)
    base = behind + (row * tl.cdiv(time, L) * 12 + side * 6) * C + c
    one, two, far_one, far_two, key, far = _no_pull(w)
    blocks = tl.cdiv(count, L).to(tl.int32)
    for group in range(tl.cdiv(blocks, P)):
        found = ()
        for i in tl.static_range(P):
            turn = group * P + i
            block = tl.where(side == 0, turn, blocks - 1 - turn)
            found = found + (_read(base + block * 12 * C, C, c < tl.where(blocks > turn, C, 0), 6),)
        for i in tl.static_range(P):
            turn = group * P + i
            if blocks > turn:
                block = tl.where(side == 0, turn, blocks - 1 - turn)
                _write(base + block * 12 * C, C, live_c, (one, two, far_one, far_two, key, far), 6)
                steps = tl.minimum(count - block * L, L).to(w.dtype)
                old, now, key, far = meet(key, far + steps * w, found[i][4], found[i][5])
                far_one = (far_one + steps * one) * old + found[i][2] * now
                far_two = (far_two + steps * two) * old + found[i][3] * now
                one = one * old + found[i][0] * now
                two = two * old + found[i][1] * now
