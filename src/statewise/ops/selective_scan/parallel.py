"""The selective scan in blocks: all blocks advance together, position by position, then blocks are joined.

Legend: batch, t tokens of one segment, n blocks, L positions of a block, R = batch·n, G groups, N state size,
E = channels/G. Inside, positions of a block are axis 0 and channels are the last axis: what differs along N (B, C) then
is one number per row of channels, and every position is one stretch of memory. The derivation is in README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statewise.ops.segments import register_segmented

__all__ = ["selective_scan"]

_BLOCK = 8
# The (rows, t, channels, N) tensors of one segment are to stay in cache, so it is short, and a large batch is walked a
# few rows at a time.
_SEGMENT = 32
_LARGEST = 1 << 20


def _split(x: Tensor, length: int) -> Tensor:
    """``(batch, t, ...)`` → ``(L, R, ...)``; zeros fill the last block: with dt = 0 they change nothing."""
    batch, time, *rest = x.shape
    count = -(-time // length)
    if pad := count * length - time:
        x = torch.cat([x, x.new_zeros(batch, pad, *rest)], 1)
    return x.reshape(batch * count, length, *rest).transpose(0, 1).contiguous()


def _join(x: Tensor, like: Tensor) -> Tensor:
    """The way back, to the batch and t of ``like``."""
    length, rows, *rest = x.shape
    batch, time = like.shape[:2]
    return x.transpose(0, 1).reshape(batch, rows * length // max(batch, 1), *rest)[:, :time]


def _by_row(x: Tensor, batch: int) -> Tensor:
    """``(R, ...)`` → ``(batch, n, ...)``."""
    return x.reshape(batch, x.shape[0] // max(batch, 1), *x.shape[1:])


def _starts(ends: Tensor, total: Tensor, start: Tensor) -> Tensor:
    """What each block starts from, ``(R, ...)``, given each block's end from zero and its whole decay."""
    batch = start.shape[0]
    starts = [start]
    blocks = zip(_by_row(ends, batch).unbind(1), _by_row(total, batch).unbind(1), strict=True)
    for end, decay in list(blocks)[:-1]:
        starts.append(torch.addcmul(end, decay, starts[-1]))
    return torch.stack(starts, 1).flatten(0, 1)


def _advance(decay: Tensor, h: Tensor, total: Tensor, start: Tensor) -> Tensor:
    """Turn ``h``, holding what each token adds, into the states after every token; returns each block's start."""
    end = h[0]
    spare = [torch.empty_like(end), torch.empty_like(end)]
    for position in range(1, h.shape[0]):
        end = torch.addcmul(h[position], decay[position], end, out=spare[position % 2])
    starts = _starts(end, total, start)
    before = starts
    for position in range(h.shape[0]):
        before = h[position].addcmul_(decay[position], before)
    return starts


def _retreat(decay: Tensor, g: Tensor, total: Tensor, end: Tensor) -> None:
    """Turn ``g``, holding each state's gradient through its own output, into its whole gradient.

    ``end`` ``(batch, G, N, E)`` arrives from beyond the segment."""
    after = g[-1]
    spare = [torch.empty_like(after), torch.empty_like(after)]
    for position in reversed(range(g.shape[0] - 1)):
        after = torch.addcmul(g[position], decay[position + 1], after, out=spare[position % 2])

    def reverse(x: Tensor) -> Tensor:
        return _by_row(x, end.shape[0]).flip(1).flatten(0, 1)

    g[-1].add_(reverse(_starts(reverse(after * decay[0]), reverse(total), end)))
    for position in reversed(range(g.shape[0] - 1)):
        g[position].addcmul_(decay[position + 1], g[position + 1])


class _Segment(torch.autograd.Function):
    """One segment: x, dt ``(batch, t, G, E)``; B, C ``(batch, t, G, N)``; A ``(G, N, E)``; state ``(batch, G, N, E)``.

    Backward is the same recurrence from the other end. Written out, it touches the ``(t, N, channels)`` tensors half
    as often as autograd would, and in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        length = min(_BLOCK, x.shape[1])
        xs, dts, Bs, Cs = (_split(value, length) for value in (x, dt, B, C))
        decay = (dts.unsqueeze(-2) * A).exp_()
        total = torch.exp(dts.sum(0).unsqueeze(-2) * A)
        h = Bs.unsqueeze(-1) * (dts * xs).unsqueeze(-2)
        starts = _advance(decay, h, total, state)
        y = (Cs.unsqueeze(-2) @ h).squeeze(-2)
        ctx.save_for_backward(x, A, xs, dts, Bs, Cs, decay, total, h, starts)
        return _join(y, x), _by_row(h[-1], x.shape[0])[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_end: Tensor) -> tuple[Tensor, ...]:
        x, A, xs, dts, Bs, Cs, decay, total, h, starts = ctx.saved_tensors
        dys = _split(dy, xs.shape[0])
        g = Cs.unsqueeze(-1) * dys.unsqueeze(-2)
        _retreat(decay, g, total, d_end)
        d_state = _by_row(g[0] * decay[0], x.shape[0])[:, 0]

        d_added = (Bs.unsqueeze(-2) @ g).squeeze(-2)  # of dt·x
        dB = ((dts * xs).unsqueeze(-2) @ g.transpose(-1, -2)).squeeze(-2)
        dC = (dys.unsqueeze(-2) @ h.transpose(-1, -2)).squeeze(-2)
        d_dt = d_added * xs
        dA = torch.zeros_like(g[0])
        spare = torch.empty_like(dA)
        before = starts
        for position in range(g.shape[0]):
            exponent = g[position].mul_(decay[position]).mul_(before)  # the gradient of dt·A
            before = h[position]
            dA.addcmul_(exponent, dts[position].unsqueeze(-2))
            d_dt[position] += torch.mul(exponent, A, out=spare).sum(-2)
        return _join(d_added * dts, x), _join(d_dt, x), _join(dB, x), _join(dC, x), dA.sum(0), d_state


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    y, end = _Segment.apply(*inputs, *parameters, *leaves)  # type: ignore[no-untyped-call]
    return y, [end]


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
    batch, time, channels = x.shape
    groups, size = B.shape[2:]
    grouped = (batch, time, groups, channels // groups)

    def inward(value: Tensor) -> Tensor:
        """``(..., channels, N)`` → ``(..., G, N, E)``."""
        return value.reshape(*value.shape[:-2], groups, -1, size).transpose(-1, -2).contiguous()

    A = inward(A)
    rows = max(1, _LARGEST // (min(time, _SEGMENT) * A.numel()))
    split = [torch.split(value, rows) for value in (x.reshape(grouped), dt.reshape(grouped), B, C, inward(h))]
    parts = [_selective_scan(*inputs, A, start) for *inputs, start in zip(*split, strict=True)]
    y, end = parts[0] if len(parts) == 1 else (torch.cat(part) for part in zip(*parts, strict=True))
    return y.flatten(2), end.transpose(-1, -2).reshape(batch, channels, size).contiguous()
