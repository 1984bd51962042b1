"""WKV-6 in chunks: inside a chunk a matrix of weights between its tokens, from chunk to chunk a decayed sum.

Legend: B batch, t tokens of one segment, n chunks, L positions of a chunk, H heads, K key rows, V value columns.
The derivation is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.segments import register_segmented

__all__ = ["wkv6"]

_CHUNK = 64  # a power of two, see _weights
_SEGMENT = 256


def _per_token(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    r, log_w, k, v = (x.transpose(1, 2) for x in inputs)
    y, end = _chunks(r, torch.exp(log_w), k, v, parameters[0], leaves[0])
    return y.transpose(1, 2), [end]


def _constant(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    r, k, v = (x.transpose(1, 2) for x in inputs)
    log_w, u = parameters
    (now,) = leaves
    decay = torch.exp(log_w)[None, :, None]  # (1, H, 1, K)
    # All positions of full chunks share one decay. What is left over is a chunk of its own: its padding has none.
    full = r.shape[2] // _CHUNK * _CHUNK
    rest = r.shape[2] - full
    parts = []
    if full:
        y, now = _chunks(r[:, :, :full], decay, k[:, :, :full], v[:, :, :full], u, now)
        parts.append(y)
    if rest:
        y, now = _chunks(r[:, :, full:], decay.expand(-1, -1, rest, -1), k[:, :, full:], v[:, :, full:], u, now)
        parts.append(y)
    return torch.cat(parts, 2).transpose(1, 2), [now]


def _chunks(r: Tensor, decay: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of ``(B, H, t, ·)``; decay likewise, or for all rows ``(1, H, t, K)``, or for all tokens too
    ``(1, H, 1, K)`` if t is a multiple of the chunk."""
    time = r.shape[2]
    length = min(_CHUNK, 1 << (time - 1).bit_length())
    # Padding tokens forget nothing (a decay of one) and add nothing.
    r, k, v = (_cut(x, length, 0.0) for x in (r, k, v))  # (B, H, n, L, K or V)
    weights, read, learnt, keep = _weights(
        r, decay[:, :, None] if decay.shape[2] == 1 else _cut(decay, length, 1.0), k, u
    )
    added = learnt.transpose(3, 4) @ v
    now, starts = state, []
    for kept, new in zip(keep.expand(-1, -1, v.shape[2], -1).unbind(2), added.unbind(2), strict=True):
        starts.append(now)
        now = torch.addcmul(new, kept[..., None], now)
    y = weights @ v + read @ torch.stack(starts, 2)
    return y.flatten(2, 3)[:, :, :time], now


def _cut(x: Tensor, length: int, padding: float) -> Tensor:
    """``(B, H, t, ·)`` → ``(B, H, n, L, ·)``."""
    pad = -x.shape[2] % length
    if pad:  # by nothing would be a copy
        x = torch.nn.functional.pad(x, (0, 0, 0, pad), value=padding)
    return x.reshape(*x.shape[:2], x.shape[2] // length, length, x.shape[3])


def _weights(r: Tensor, decay: Tensor, k: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How much of each token's value every token of its chunk reads ``(B, H, n, L, L)``; r decayed from the chunk's
    start and k decayed to its end ``(B, H, n, L, K)``; the decay of a whole chunk ``(B or 1, H, n or 1, K)``.

    Blocks of one position are joined two by two. ``read`` holds r times the decay since its block's start, ``learnt``
    k times the decay to its block's end: their product over a border is the weight between the two. Every factor is a
    product of decays, at most one: nothing is divided, and what underflows belongs to a product that does.
    """
    read, learnt, keep = r[..., None, :], k[..., None, :], decay[..., None, :]  # (B, H, n, blocks, size, K)
    weights = (r * u[:, None, None] * k).sum(4)[..., None, None]  # (B, H, n, blocks, size, size)
    while read.shape[3] > 1:
        (r0, r1), (k0, k1), (w0, w1) = map(_pairs, (read, learnt, weights))
        d0, d1 = _pairs(keep) if keep.shape[3] > 1 else (keep, keep)
        across = r1 @ k0.transpose(4, 5)
        weights = torch.cat([torch.cat([w0, torch.zeros_like(w0)], 5), torch.cat([across, w1], 5)], 4)
        read, learnt, keep = torch.cat([r0, r1 * d0], 4), torch.cat([k0 * d1, k1], 4), d0 * d1
    return weights[:, :, :, 0], read[:, :, :, 0], learnt[:, :, :, 0], keep[:, :, :, 0, 0]


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    """The earlier and the later block of every pair."""
    return x.reshape(*x.shape[:3], x.shape[3] // 2, 2, *x.shape[4:]).unbind(4)


_wkv6 = register_segmented(
    "wkv6",
    _per_token,
    time=("r", "log_w", "k", "v"),
    shared=("u",),
    state=("state",),
    output="v",
    segment=_SEGMENT,
)
_wkv6_constant = register_segmented(
    "wkv6_constant",
    _constant,
    time=("r", "k", "v"),
    shared=("log_w", "u"),
    state=("state",),
    output="v",
    segment=_SEGMENT,
)


def wkv6(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of ``(B, T, H, ·)``, T ≥ 1, all tensors of one dtype; log_w also ``(H, K)``."""
    if log_w.dim() == 4:
        y, end = _wkv6(r, log_w, k, v, u, state)
    else:
        y, end = _wkv6_constant(r, k, v, log_w, u, state)
    return y, end
