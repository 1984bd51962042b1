"""The selective scan in blocks: all blocks advance together, position by position, then blocks are joined.

Legend: t tokens of one segment, n blocks, L positions of a block, G groups, N state size.

h_t = a_t h_{t-1} + b_t is solved in every block from zero, beside the products of its decays; what a block starts from
is then added, times those products. Products of decays never exceed one and nothing is divided by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.ops.segments import register_segmented

__all__ = ["selective_scan"]

_BLOCK = 8
_SEGMENT = 64


def _solve(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Every h of ``h_t = a_t h_{t-1} + b_t``; a, b ``(batch, t, ...)``, start ``(batch, ...)``."""
    time = a.shape[1]
    whole = time - time % _BLOCK
    h = b.clone()
    if whole:
        blocks = (a.shape[0], whole // _BLOCK, _BLOCK, *a.shape[2:])
        inside, product = h[:, :whole].view(blocks), a[:, :whole].reshape(blocks).clone()
        for at in range(1, _BLOCK):
            inside[:, :, at].addcmul_(product[:, :, at], inside[:, :, at - 1])
            product[:, :, at].mul_(product[:, :, at - 1])
        for block in range(blocks[1]):
            inside[:, block].addcmul_(product[:, block], start[:, None])
            start = inside[:, block, -1]
    for at in range(whole, time):  # fewer than a block are left
        h[:, at].addcmul_(a[:, at], start)
        start = h[:, at]
    return h


class _Scan(torch.autograd.Function):
    """:func:`_solve`, whose backward is the same recurrence run from the end."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        h = _solve(a, b, start)
        ctx.save_for_backward(a, h, start)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, start = ctx.saved_tensors
        # g_t = grad_t + a_{t+1} g_{t+1}; nothing follows the last.
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], 1)
        g = _solve(following.flip(1), grad.flip(1), torch.zeros_like(start)).flip(1)
        before = torch.cat([start[:, None], h[:, :-1]], 1)
        return g * before, g, a[:, 0] * g[:, 0]


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    x, dt, B, C = inputs
    (A,), (start,) = parameters, leaves
    batch, time, channels = x.shape
    groups, size = B.shape[2:]
    decay = torch.exp(dt[..., None] * A)  # (batch, t, channels, N)
    added = ((dt * x).view(batch, time, groups, -1, 1) * B[:, :, :, None]).view(batch, time, channels, size)
    h: Tensor = _Scan.apply(decay, added, start)  # type: ignore[no-untyped-call]
    y = (h.view(batch, time, groups, -1, size) @ C[..., None]).view(batch, time, channels)
    return y, [h[:, -1]]


_selective_scan = register_segmented(
    "selective_scan",
    _segment,
    time=("x", "dt", "B", "C"),
    shared=("A",),
    state=("state",),
    output="x",
    segment=_SEGMENT,
)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens, T ≥ 1; B, C ``(batch, T, G, N)``; all tensors of one dtype."""
    y, h = _selective_scan(x.contiguous(), dt.contiguous(), B, C, A, h)
    return y, h
