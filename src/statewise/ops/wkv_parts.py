"""Device functions of averages weighted by exp(key), which `wkv4` and `bi_wkv` share. Imported by kernels alone.

Legend: U tokens of a chunk, N chunks of a block, L = U·N; C channels, CB channels of a program; c a channel, i and j
chunks. A lane is one channel of one chunk: tensors are ``(N, CB)`` unless said otherwise, and a tuple has one a token.

A sum is (num, den, key, far) and means num·e^{key + far}, den·e^{key + far}: the key of its largest term, and how far
that has faded (or, if log_w > 0, grown) since. Only differences of keys and of distances faded are ever exponentiated,
all of them at most zero, and neither loses digits to the other. Nothing is ever subtracted from a sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "alive",
    "around",
    "bounded",
    "gather",
    "meet",
    "nothing",
    "pick",
    "together",
    "tokens",
]


@triton.jit
def nothing(like):
    """The key of an empty sum, below every key."""
    if like.dtype == tl.float64:
        key = tl.full(like.shape, -1e300, tl.float64)
    else:
        key = tl.full(like.shape, -1e38, tl.float32)
    return key


@triton.jit
def bounded(log_w, c, live_c):
    """log_w ``(CB,)``; no step of -inf is 0, so it is a number instead, far below keys masked with -1e30."""
    return tl.maximum(tl.load(log_w + c, mask=live_c, other=0.0), -1e34)


@triton.jit
def alive(first, here, w, U: tl.constexpr):
    """``(N, 1)`` each: 1 where there is such a token of a block of ``here`` tokens, and 0; ``first`` of each chunk."""
    found = ()
    for t in tl.static_range(U):
        found = found + ((first + t < here).to(w.dtype)[:, None],)
    return found


@triton.jit
def tokens(x, at, first, here, C, live_c, w, KEYS: tl.constexpr, U: tl.constexpr):
    """All tokens of every chunk, ``at`` where the first lies; where there is none, 0, or the key of nothing."""
    found = ()
    for t in tl.static_range(U):
        mask = (first + t < here)[:, None] & live_c[None, :]
        one = tl.load(x + at + t * C, mask=mask, other=0.0).to(w.dtype)
        if KEYS:
            one = tl.where(mask, one, nothing(one))
        found = found + (one,)
    return found


@triton.jit
def meet(key, far, other_key, other_far):
    """The weights of two sums at the larger of their exponents, and that."""
    gap = (key - other_key) + (far - other_far)
    leads = gap >= 0.0
    lesser = tl.exp(-tl.abs(gap))
    one, other = tl.where(leads, 1.0, lesser), tl.where(leads, lesser, 1.0)
    return one, other, tl.where(leads, key, other_key), tl.where(leads, far, other_far)


@triton.jit
def gather(k, v, live, w, RIGHT: tl.constexpr, U: tl.constexpr):
    """The sum of every chunk as the token after it sees it; RIGHT: as the token before it does."""
    num = tl.full(v[0].shape, 0.0, v[0].dtype)
    den = tl.full(num.shape, 0.0, num.dtype)
    far = tl.full(num.shape, 0.0, num.dtype)
    key = nothing(num)
    for t in tl.static_range(U - 1 if RIGHT else 0, -1 if RIGHT else U, -1 if RIGHT else 1):
        old, now, key, far = meet(key, far + live[t] * w[None, :], k[t], 0.0)
        num = num * old + v[t] * now
        den = den * old + live[t] * now
    return num, den, key, far


@triton.jit
def around(key, far, in_key, in_far, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    """How what stands before every chunk (RIGHT: behind it) is made of the chunks there and of what came to the block.

    Returns ``(N, N, CB)`` weights of chunk i in chunk j, that of what came being i = j; ``(N, N, 1)`` steps of distance
    between them; the key and far of the sum.
    """
    i, j = tl.arange(0, N)[:, None, None], tl.arange(0, N)[None, :, None]
    if RIGHT:
        seen = i > j
        came = tl.maximum(here - (j + 1) * U, 0)  # a block's last tokens may be missing
        steps = tl.where(seen, (i - 1 - j) * U, came).to(w.dtype)
    else:
        seen = i < j
        steps = tl.where(seen, (j - 1 - i) * U, j * U).to(w.dtype)
    keys = tl.where(seen, key[:, None, :], in_key[None, None, :])
    top = tl.max(keys, 0)
    fars = tl.where(seen, far[:, None, :], in_far[None, None, :])
    exponents = (keys - top[None, :, :]) + (fars + steps * w[None, None, :])
    exponents = tl.where(seen | (i == j), exponents, float("-inf"))
    largest = tl.max(exponents, 0)
    return tl.exp(exponents - largest[None, :, :]), steps, top, largest


@triton.jit
def pick(weights, x, came, N: tl.constexpr):
    """Chunks' numbers ``x`` and those that came ``(CB,)``, added with the weights of :func:`around`."""
    i, j = tl.arange(0, N)[:, None, None], tl.arange(0, N)[None, :, None]
    return tl.sum(weights * tl.where(i == j, came[None, None, :], x[:, None, :]), 0)


@triton.jit
def together(key, far, here, w, RIGHT: tl.constexpr, U: tl.constexpr, N: tl.constexpr):
    """How all chunks make the sum of the block: weights ``(N, CB)``, steps ``(N, 1)``, key and far ``(CB,)``."""
    i = tl.arange(0, N)[:, None]
    steps = i * U if RIGHT else tl.maximum(here - (i + 1) * U, 0)
    steps = steps.to(w.dtype)
    top = tl.max(key, 0)
    exponents = (key - top[None, :]) + (far + steps * w[None, :])
    largest = tl.max(exponents, 0)
    return tl.exp(exponents - largest[None, :]), steps, top, largest
