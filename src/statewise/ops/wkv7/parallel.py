"""WKV-7 in chunks: inside a chunk one triangular system, from chunk to chunk one affine map of the state.

Legend: B batch, t tokens of one segment, n chunks, L positions of a chunk, H heads, K key rows, V value columns.
The derivation is in README.md beside this file; names here follow it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.segments import register_segmented

__all__ = ["wkv7"]

_CHUNK = 16  # a power of two, see _halve
_SEGMENT = 128

# Largest total log decay of a chunk for which decays between two positions may be split into two factors around the
# chunk's middle. Either factor stays below e^16, and half an ulp of an exponent of 16 is 1e-6 of the result in float32.
_SPLITTABLE = 32.0


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    (state,) = leaves
    batch, time, heads, rows = inputs[0].shape
    length = min(_CHUNK, 1 << (time - 1).bit_length())
    pad = -time % length  # padding tokens are zeros: nothing forgotten, nothing learnt
    chunks = (time + pad) // length
    r, log_w, k, v, a, b = (
        torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, pad)).reshape(batch * heads * chunks, length, x.shape[3])
        for x in inputs
    )  # (B·H·n, L, K or V)

    upto = log_w.cumsum(1)  # log decay from the chunk's start through t
    before = torch.nn.functional.pad(upto[:, :-1], (0, 0, 1, 0))  # ... through t - 1
    rest = log_w.flip(1).cumsum(1).flip(1)  # from t through the end
    after = torch.nn.functional.pad(rest[:, 1:], (0, 0, 0, 1))  # from t + 1 through the end
    r_in, a_in = r * torch.exp(upto), a * torch.exp(before)
    k_out, b_out = k * torch.exp(after), b * torch.exp(after)

    strong = (upto[:, -1] < -_SPLITTABLE).any(1)  # each chunk decides for itself: no row feels another
    if bool(strong.any()):
        weak, strong = (x.nonzero()[:, 0] for x in (~strong, strong))
        products = torch.cat(
            [
                _split(*[x[weak] for x in (r, k, a, b, upto, before)]),
                _halve(*[x[strong] for x in (r, k, a, b, log_w)]),
            ]
        )[torch.cat([weak, strong]).argsort()]
    else:
        products = _split(r, k, a, b, upto, before)
    rb, rk, ab, ak = products.unbind(1)

    # [W | U] = (I - ab)⁻¹ [a_in | ak v]: what a_t finds is W_t S + U_t, S being the state the chunk starts from.
    found = torch.linalg.solve_triangular(
        torch.eye(length, dtype=ab.dtype, device=ab.device) - ab,
        torch.cat([a_in, ak @ v], 2),
        upper=False,
        unitriangular=True,
    )
    read, y = (torch.cat([r_in, rk @ v], 2) + rb @ found).tensor_split([rows], 2)
    keep = torch.diag_embed(torch.exp(upto[:, -1]))
    move, add = (torch.cat([keep, k_out.transpose(1, 2) @ v], 2) + b_out.transpose(1, 2) @ found).tensor_split(
        [rows], 2
    )

    now = state.flatten(0, 1)
    starts = []
    per_head = (batch * heads, chunks, rows)
    for m, c in zip(move.reshape(*per_head, rows).unbind(1), add.reshape(*per_head, v.shape[2]).unbind(1), strict=True):
        starts.append(now)
        now = torch.baddbmm(c, m, now)
    y = y + read @ torch.stack(starts, 1).flatten(0, 1)
    y = y.reshape(batch, heads, time + pad, v.shape[2])[:, :, :time].transpose(1, 2)
    return y, [now.reshape(state.shape)]


def _split(r: Tensor, k: Tensor, a: Tensor, b: Tensor, upto: Tensor, before: Tensor) -> Tensor:
    """rb, rk, ab, ak as ``(chunks, 4, L, L)``; decays split around the middle of each chunk's decay."""
    length = r.shape[1]
    middle = upto[:, -1:].detach() / 2  # cancels out, so its gradient is zero
    up = torch.exp(middle - upto)
    rows = torch.cat([r * torch.exp(upto - middle), a * torch.exp(before - middle)], 1)
    columns = torch.cat([b * up, k * up], 1)
    products = _quarters(rows @ columns.transpose(1, 2))
    causal = torch.ones(2, length, length, dtype=torch.bool, device=r.device).tril()
    causal[1].fill_diagonal_(False)  # r reads after the update, a before it
    return torch.where(causal.repeat_interleave(2, 0), products, 0.0)


def _halve(r: Tensor, k: Tensor, a: Tensor, b: Tensor, log_w: Tensor) -> Tensor:
    """As :func:`_split`, for any log_w ≤ 0, -inf included.

    A block is halved until one position is left. Between a later and an earlier half, decays are split at the border of
    the halves: both factors are sums of log_w on one side of it, so neither exceeds one, nothing is ever subtracted,
    and a factor that underflows belongs to a product that does.
    """
    r, k, a, b, log_w = (x.unsqueeze(2) for x in (r, k, a, b, log_w))  # (chunks, blocks, size, K)
    upto, before, after, total = log_w, torch.zeros_like(log_w), torch.zeros_like(log_w), log_w
    rb, rk = ((r * x).sum(3, keepdim=True) for x in (b, k))
    products = torch.stack([rb, rk, torch.zeros_like(rb), torch.zeros_like(rk)], 2)  # (chunks, blocks, 4, size, size)
    while r.shape[1] > 1:
        (r0, r1), (k0, k1), (a0, a1), (b0, b1) = map(_halves, (r, k, a, b))
        (u0, u1), (f0, f1), (e0, e1), (t0, t1) = map(_halves, (upto, before, after, total))
        down = torch.exp(e0)
        rows = torch.cat([r1 * torch.exp(u1), a1 * torch.exp(f1)], 2)
        cross = _quarters(rows @ torch.cat([b0 * down, k0 * down], 2).transpose(2, 3))
        p0, p1 = _halves(products)
        products = torch.cat([torch.cat([p0, torch.zeros_like(p0)], 4), torch.cat([cross, p1], 4)], 3)
        r, k, a, b = (torch.cat(pair, 2) for pair in ((r0, r1), (k0, k1), (a0, a1), (b0, b1)))
        upto, before, after = (torch.cat(pair, 2) for pair in ((u0, u1 + t0), (f0, f1 + t0), (e0 + t1, e1)))
        total = t0 + t1
    return products[:, 0]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Every earlier and every later block of a pair."""
    return x[:, 0::2], x[:, 1::2]


def _quarters(x: Tensor) -> Tensor:
    """``(..., 2 s, 2 s)`` → its four quarters ``(..., 4, s, s)``, row by row."""
    size = x.shape[-1] // 2
    return x.reshape(*x.shape[:-2], 2, size, 2, size).transpose(-2, -3).flatten(-4, -3)


_wkv7 = register_segmented(
    "wkv7",
    _segment,
    time=("r", "log_w", "k", "v", "a", "b"),
    shared=(),
    state=("state",),
    output="v",
    segment=_SEGMENT,
)


def wkv7(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens of r, log_w, k, v, a, b, each ``(B, T, H, ·)``, T ≥ 1, all tensors of one dtype."""
    y, end = _wkv7(*inputs, state)
    return y, end
