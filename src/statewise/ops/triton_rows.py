"""Device functions of kernels that walk a sequence a token at a time, channels in lanes. Imported by kernels alone.

Legend: C channels, c those of a program's lanes, p and t positions in a sequence (a scalar), which starts at token
``start`` and has ``count``; W-1 samples before it came as state, ``window`` (n, W-1, C).

A condition on a position joins the mask of channels as a bound, ``c < tl.where(condition, C, 0)``: a mask & a scalar is
one the interpreter gets wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rows", "seen"]


@triton.jit
def seen(x, window, row, start, count, p, c, C, W: tl.constexpr):
    """The sample at position p, in the dtype of the window; zero after the last and before the window."""
    new = tl.load(x + (start + p) * C + c, mask=c < tl.where((p >= 0) & (p < count), C, 0), other=0.0)
    at = window + (row * (W - 1) + W - 1 + p) * C + c
    old = tl.load(at, mask=c < tl.where((p < 0) & (p >= 1 - W), C, 0), other=0.0)
    return new.to(old.dtype) + old


@triton.jit
def rows(x, start, count, t, c, C, N: tl.constexpr):
    """N rows of x from position t on, as they are; zeros from ``count`` on. Loaded before any is used, so that all are
    under way at once."""
    found = ()
    for s in tl.static_range(N):
        found = found + (tl.load(x + (start + t + s) * C + c, mask=c < tl.where(t + s < count, C, 0), other=0.0),)
    return found
