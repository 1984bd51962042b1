"""SSD in chunks: inside a chunk the attention-like matrix form, from chunk to chunk the state.

Legend: batch, t tokens of one segment, which is one chunk; G groups, E heads of a group, P width, N state size.
The derivation is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.segments import register_segmented

__all__ = ["ssd"]

_CHUNK = 64


def _between(log_decay: Tensor) -> Tensor:
    """``(..., t)`` → ``(..., t, t)``: the log decay from after token j through token i, for i ≥ j.

    Summed from j on, not as a difference of two sums from the start: far into a chunk that difference would keep
    rounding errors of decays long gone."""
    t = log_decay.shape[-1]
    below = torch.ones(t, t, dtype=torch.bool, device=log_decay.device).tril(-1)
    return torch.where(below, log_decay[..., None], 0.0).cumsum(-2)


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    x, dt, B, C = inputs
    (A,), (state,) = parameters, leaves
    batch, t, heads, width = x.shape
    groups, size = B.shape[2:]
    grouped = (batch, groups, heads // groups)

    steps = dt.transpose(1, 2).reshape(*grouped, t)
    log_decay = steps * A.view(groups, -1, 1)
    gap = _between(log_decay)
    weights = torch.exp(gap).tril()  # (batch, G, E, t, t)
    upto = torch.exp(log_decay.cumsum(-1))  # what the state at the chunk's start still weighs at each token
    added = (x.transpose(1, 2) * dt.transpose(1, 2)[..., None]).reshape(*grouped, t, width)
    B, C = B.transpose(1, 2), C.transpose(1, 2)  # (batch, G, t, N)
    # Heads of a group read B and C as one matrix of E·P rows: per head, both would be copied E times.
    start = state.reshape(batch, groups, -1, size)

    scores = (C @ B.transpose(-1, -2))[:, :, None] * weights
    past = (start @ C.transpose(-1, -2)).view(*grouped, width, t).transpose(-1, -2)
    y = scores @ added + past * upto[..., None]
    rest = weights[..., -1, :, None]  # what each token still weighs at the end
    learnt = (added * rest).transpose(-1, -2).reshape(batch, groups, -1, t) @ B
    end = state * upto[..., -1].reshape(batch, heads, 1, 1) + learnt.view(batch, heads, width, size)
    return y.reshape(batch, heads, t, width).transpose(1, 2), [end]


_ssd = register_segmented(
    "ssd",
    _segment,
    time=("x", "dt", "B", "C"),
    shared=("A",),
    state=("state",),
    output="x",
    segment=_CHUNK,
)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens, T ≥ 1; all tensors of one dtype."""
    y, end = _ssd(x, dt, B, C, A, h)
    return y, end
