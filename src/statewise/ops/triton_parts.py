"""Device functions that several kernels share. Imported by kernels alone, so only where triton is.

Legend: L tokens of a chunk. RAGGED is 0 dense, 1 padded, 2 packed (see :mod:`statewise.ops.gpu`).
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["apart", "dot", "first_slot", "locate_row", "locate_slot", "lost", "onto", "sigmoid", "silu", "softplus"]


@triton.jit
def locate_row(row, time, lengths, cu_seqlens, RAGGED: tl.constexpr):
    """Where a sequence starts among all tokens (int64), and how many it has."""
    if RAGGED == 2:
        start = tl.load(cu_seqlens + row).to(tl.int64)
        count = tl.load(cu_seqlens + row + 1).to(tl.int64) - start
    elif RAGGED == 1:
        start = row.to(tl.int64) * time
        count = tl.load(lengths + row).to(tl.int64)
    else:
        start = row.to(tl.int64) * time
        count = tl.cast(time, tl.int64)
    return start, count


@triton.jit
def first_slot(row, time, cu_seqlens, L: tl.constexpr, RAGGED: tl.constexpr):
    """The slot of a sequence's first chunk (int64)."""
    if RAGGED == 2:
        slot = tl.load(cu_seqlens + row).to(tl.int64) // L + row
    else:
        slot = row.to(tl.int64) * tl.cdiv(time, L)
    return slot


@triton.jit
def locate_slot(slot, time, lengths, cu_seqlens, row_of, L: tl.constexpr, RAGGED: tl.constexpr):
    """Of a slot: its sequence, its place among that sequence's chunks, its first token among all tokens (int64), and
    how many tokens it has (int64; none or fewer: no such chunk)."""
    if RAGGED == 2:
        row = tl.load(row_of + slot).to(tl.int64)
    else:
        row = slot.to(tl.int64) // tl.cdiv(time, L)
    start, count = locate_row(row, time, lengths, cu_seqlens, RAGGED)
    chunk = slot - first_slot(row, time, cu_seqlens, L, RAGGED)
    return row, chunk, start + chunk * L, tl.minimum(count - chunk * L, L)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x); no overflow matters: 1 / inf is 0."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + e^x), the identity above 20, as torch has it; the small side keeps its digits."""
    e = tl.exp(tl.minimum(x, 20.0))
    one = 1.0 + e
    # log(1 + e) with e's lost digits made good: exact to rounding for any e.
    small = tl.where(one == 1.0, e, tl.log(one) * (e / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _round_tf32(x):
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, in the accumulation dtype; PRECISION as :func:`statewise.ops.gpu.dot_precision` says."""
    if PRECISION == "bf16":
        c = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == "bf16-emulated":
        c = tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
    elif PRECISION == "tf32-emulated":
        c = tl.dot(_round_tf32(a), _round_tf32(b), input_precision="ieee")
    elif PRECISION == "ieee":
        c = tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    else:
        c = tl.dot(a, b, input_precision=PRECISION)
    return c


@triton.jit
def _three(c, a, b, TURN: tl.constexpr):
    """c + a @ b as three TF32 products of what TF32 holds of a and b and of what it loses, each in a block of its own
    (see :func:`onto`; Triton's "tf32x3" puts them into one). An infinite factor gives NaN."""
    a_held = _round_tf32(a)
    b_held = _round_tf32(b)
    if tl.program_id(2) >= -3 * TURN:
        c = tl.dot(a - a_held, b_held, c, input_precision="tf32")
    if tl.program_id(2) >= -3 * TURN - 1:
        c = tl.dot(a_held, b - b_held, c, input_precision="tf32")
    if tl.program_id(2) >= -3 * TURN - 2:
        c = tl.dot(a_held, b_held, c, input_precision="tf32")
    return c


@triton.jit
def onto(c, a, b, PRECISION: tl.constexpr, TURN: tl.constexpr = 0):
    """c + :func:`dot`, the product in a block of its own.

    Where another product of the same block hangs together with one, Triton lays all warps along one axis. Of a tile
    too low for them several then make the same rows, and each holds a whole operand in its registers. By itself, a
    product has its warps along both axes. The condition always holds; only the last stage of compilation knows that,
    and drops it.

    A loop whose loads should be under way before they are needed takes :func:`dot` for its first product instead: what
    is in a block of its own is not started ahead.

    TURN: two products with nothing in between need different ones, or their blocks are made one.
    """
    if PRECISION == "tf32x3":
        c = _three(c, a, b, TURN)
    elif tl.program_id(2) >= -TURN:
        c += dot(a, b, PRECISION)
    return c


@triton.jit
def apart(a, b, PRECISION: tl.constexpr, TURN: tl.constexpr = 0):
    """:func:`onto` zero."""
    c = tl.zeros([a.shape[0], b.shape[1]], a.dtype if PRECISION == "ieee" else tl.float32)
    return onto(c, a, b, PRECISION, TURN)


@triton.jit
def lost(x):
    """What x loses when it is rounded to bfloat16: a second term for products that need its digits."""
    return x - x.to(tl.bfloat16).to(x.dtype)
