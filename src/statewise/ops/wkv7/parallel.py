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

_CHUNK = 16  # a power of two, see _halving
_SEGMENT = 128

# Largest total log decay of a chunk for which decays between two positions may be split into two factors around the
# chunk's middle. Either factor stays below e^16, and half an ulp of an exponent of 16 is 1e-6 of the result in float32.
_SPLITTABLE = 32.0


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    # Autocast would turn the products below to half precision; the contract accumulates in the inputs' own dtype.
    device = inputs[0].device.type
    if torch.is_grad_enabled():
        # Differentiated after this returns, still inside the guard of `segments`, which restores this setting.
        torch.set_autocast_enabled(device, False)
        return _chunks(inputs, state[0])
    with torch.autocast(device, enabled=False):
        return _chunks(inputs, state[0])


def _chunks(inputs: Sequence[Tensor], state: Tensor) -> tuple[Tensor, list[Tensor]]:
    time = inputs[0].shape[1]
    length = min(_CHUNK, 1 << (time - 1).bit_length())
    pad = -time % length  # padding tokens are zeros: nothing forgotten, nothing learnt
    r, log_w, k, v, a, b = (
        torch.unflatten(torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, pad)), 2, (-1, length)) for x in inputs
    )  # (B, H, n, L, K or V)

    upto = log_w.cumsum(3)  # log decay from the chunk's start through t
    before = torch.nn.functional.pad(upto[..., :-1, :], (0, 0, 1, 0))  # ... through t - 1
    rest = log_w.flip(3).cumsum(3).flip(3)  # from t through the end
    after = torch.nn.functional.pad(rest[..., 1:, :], (0, 0, 0, 1))  # from t + 1 through the end
    r_in, a_in = r * torch.exp(upto), a * torch.exp(before)
    k_out, b_out = k * torch.exp(after), b * torch.exp(after)

    span = upto[..., -1:, :].detach()
    if bool((span >= -_SPLITTABLE).all()):
        middle = span / 2
        up = torch.exp(middle - upto)
        rows = torch.cat([r * torch.exp(upto - middle), a * torch.exp(before - middle)], 3)
        ((rb, rk), (ab, ak)) = (
            half.chunk(2, 4) for half in (rows @ torch.cat([b * up, k * up], 3).transpose(3, 4)).chunk(2, 3)
        )
        rb, rk, ab, ak = rb.tril(), rk.tril(), ab.tril(-1), ak.tril(-1)  # (B, H, n, L, L)
    else:
        rb, rk, ab, ak = _halving(r, log_w, k, a, b)

    # [W | U] = (I - ab)⁻¹ [a_in | ak v]: what a_t finds is W_t S + U_t, S being the state the chunk starts from.
    found = torch.linalg.solve_triangular(
        torch.eye(length, dtype=ab.dtype, device=ab.device) - ab,
        torch.cat([a_in, ak @ v], 4),
        upper=False,
        unitriangular=True,
    )
    read, y = (torch.cat([r_in, rk @ v], 4) + rb @ found).split([r.shape[4], v.shape[4]], 4)
    keep = torch.diag_embed(torch.exp(upto[..., -1, :]))
    move, add = (torch.cat([keep, k_out.transpose(3, 4) @ v], 4) + b_out.transpose(3, 4) @ found).split(
        [r.shape[4], v.shape[4]], 4
    )

    now = state.flatten(0, 1)
    starts = []
    for m, c in zip(move.flatten(0, 1).unbind(1), add.flatten(0, 1).unbind(1), strict=True):
        starts.append(now)
        now = torch.baddbmm(c, m, now)
    y = y + read @ torch.stack(starts, 1).reshape(move.shape[:3] + state.shape[2:])
    return y.flatten(2, 3)[:, :, :time].transpose(1, 2), [now.reshape(state.shape)]


def _halving(r: Tensor, log_w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
    """The same four products for any log_w ≤ 0, -inf included.

    A block is halved until one position is left. Between a later and an earlier half, decays are split at the border of
    the halves: both factors are sums of log_w on one side of it, so neither exceeds one, nothing is ever subtracted,
    and a factor that underflows belongs to a product that does.
    """
    length = log_w.shape[3]
    zero = torch.zeros_like(log_w)
    upto, before, after, total = (x.unsqueeze(4) for x in (log_w, zero, zero, log_w))  # (B, H, n, blocks, size, K)
    r, k, a, b = (x.unsqueeze(4) for x in (r, k, a, b))
    rb, rk = ((r * x).sum(5, keepdim=True) for x in (b, k))
    nothing = torch.zeros_like(rb)
    products = torch.stack([rb, rk, nothing, nothing], 4)  # (B, H, n, blocks, 4, size, size)
    for _ in range(length.bit_length() - 1):
        (r0, r1), (k0, k1), (a0, a1), (b0, b1) = map(_halves, (r, k, a, b))
        (u0, u1), (f0, f1), (e0, e1), (t0, t1) = map(_halves, (upto, before, after, total))
        rows = torch.cat([r1 * torch.exp(u1), a1 * torch.exp(f1)], 4)
        columns = torch.cat([b0 * torch.exp(e0), k0 * torch.exp(e0)], 4)
        cross = rows @ columns.transpose(4, 5)
        size = r0.shape[4]
        cross = cross.reshape(*cross.shape[:4], 2, size, 2, size).transpose(5, 6).flatten(4, 5)
        p0, p1 = _halves(products)
        products = torch.cat([torch.cat([p0, torch.zeros_like(p0)], 6), torch.cat([cross, p1], 6)], 5)
        r, k, a, b = (torch.cat(pair, 4) for pair in ((r0, r1), (k0, k1), (a0, a1), (b0, b1)))
        upto, before, after = (torch.cat(pair, 4) for pair in ((u0, u1 + t0), (f0, f1 + t0), (e0 + t1, e1)))
        total = t0 + t1
    return list(products[:, :, :, 0].unbind(3))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, :, 0::2], x[:, :, :, 1::2]


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
