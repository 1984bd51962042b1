"""What the official CUDA kernels of Vision-RWKV compute, for comparisons with results that were made with them.

Legend: B batch, T time, C channels, S chunks, one a thread, L tokens of each.

They cut a sequence into S = 32 (classification) or 16 (segmentation) chunks of L = ⌈T/S⌉ tokens. At token t of the
chunk that starts at s, with w = -log_w, token i weighs

    e^{k_i - w·|t-i|}                       everywhere behind t, and before it in earlier chunks: one step too many
    e^{k_i - w·(|t-i|-1)}                   before t in its own chunk: as in the paper
    e^{u+k_t}                               t itself
    (1 - e^w)·e^{k_i + w·(t-i)}             in addition, for s < i ≤ t: what subtraction leaves of the chunk's own past

The classification kernel adds 10⁻⁶ to denominators, relative to the largest exponent of the moment. Everything is done
in float64: the last line grows as e^{w·L}, and its digits are lost in float32 when w is not small.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["CHUNKS", "official_kernel"]

#: Number of chunks → what is added to denominators.
CHUNKS = {32: 1e-6, 16: 0.0}
_NOTHING = -1e38  # an exponent no key reaches


def official_kernel(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, chunks: int) -> Tensor:
    """The kernels' sum, in place of :func:`statewise.ops.bi_wkv`; see above for what it is.

    Its gradient is that of this sum. (The kernels' own backward is the gradient of neither.)

    Args:
        k: keys ``(B, T, C)``.
        v: values ``(B, T, C)``.
        log_w: ``(C,)``, as :func:`~statewise.ops.bi_wkv` takes it: ``-spatial_decay / T``.
        u: ``(C,)``, ``spatial_first / T``.
        chunks: 32 or 16.

    Returns:
        y ``(B, T, C)`` of v's dtype; work and memory linear in T.

    Raises:
        ValueError: another number of chunks.
    """
    if chunks not in CHUNKS:
        raise ValueError(f"chunks is {chunks!r}; accepted are {', '.join(map(str, CHUNKS))}")
    rows, time, channels = k.shape
    L = -(-time // chunks)
    S = -(-time // L)  # chunks that hold a token; the others add nothing
    log_w, u = log_w.double(), u.double()
    missing = (0, 0, 0, S * L - time)
    keys = F.pad(k.double(), missing, value=_NOTHING).reshape(rows, S, L, channels)
    values = F.pad(v.double(), missing).reshape(rows, S, L, channels)
    a, b, past = _before(keys, values, log_w)
    c, d, future = _behind(keys, values, log_w)
    sums, weights = [], []
    for place in range(L):
        key, value = keys[:, :, place], values[:, :, place]
        top = torch.maximum(torch.maximum(past, future), u + key)
        e_past, e_future, e_own = (past - top).exp(), (future - top).exp(), (u + key - top).exp()
        sums.append(a * e_past + c * e_future + e_own * value)
        weights.append(b * e_past + d * e_future + e_own + CHUNKS[chunks])
        # The past fades by a step and takes this token in, at distance 0: as the paper has it.
        top = torch.maximum(past + log_w, key)
        fade, e_own = (past + log_w - top).exp(), (key - top).exp()
        a, b, past = a * fade + e_own * value, b * fade + e_own, top
        if place + 1 < L:
            # The future grows by a step before the next token leaves it, so more is taken out than was in.
            key, value = keys[:, :, place + 1], values[:, :, place + 1]
            top = torch.maximum(future, key)
            grow, e_own = (future - top).exp(), (key - top).exp()
            c, d, future = c * grow - e_own * value, d * grow - e_own, top - log_w
    # Padding is cut off before the division, where it could become 0/0.
    flat = [torch.stack(part, 2).reshape(rows, S * L, channels)[:, :time] for part in (sums, weights)]
    return (flat[0] / flat[1]).to(v.dtype)


def _before(k: Tensor, v: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over earlier chunks as each chunk's first token sees them: values, weights, and the exponent outside."""
    places = torch.arange(k.shape[2], 0, -1, dtype=k.dtype, device=k.device)[:, None]  # steps to just after the end
    chunk = torch.arange(k.shape[1], device=k.device)
    between = chunk[:, None] - chunk - 1
    return _join(*_sum(k + places * log_w, v), between, k.shape[2], log_w)


def _behind(k: Tensor, v: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same over the own chunk and those behind it, without the own first token."""
    places = torch.arange(k.shape[2], dtype=k.dtype, device=k.device)[:, None]
    chunk = torch.arange(k.shape[1], device=k.device)
    c, d, top = _join(*_sum(k + places * log_w, v), chunk - chunk[:, None], k.shape[2], log_w)
    first = (k[:, :, 0] - top).exp()
    return c - first * v[:, :, 0], d - first, top


def _sum(exponent: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(B, S, L, C)`` summed over a chunk's tokens, relative to the largest exponent."""
    top = exponent.amax(2)
    weight = (exponent - top[:, :, None]).exp()
    return (weight * v).sum(2), weight.sum(2), top


def _join(
    num: Tensor, den: Tensor, top: Tensor, apart: Tensor, length: int, log_w: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks' sums ``(B, S, C)`` joined for every chunk: ``apart`` ``(S, S)`` chunks away, left out where negative."""
    exponent = top[:, None] + apart.clamp(min=0)[:, :, None] * length * log_w  # (B, S here, S there, C)
    taken = (apart >= 0)[:, :, None]
    exponent = torch.where(taken, exponent, _NOTHING)
    top = exponent.amax(2)
    weight = torch.where(taken, (exponent - top[:, :, None]).exp(), 0.0)
    return (weight * num[:, None]).sum(2), (weight * den[:, None]).sum(2), top
