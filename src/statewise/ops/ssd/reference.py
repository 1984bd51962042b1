"""The equation as a loop over time: slow, obvious, and right by definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ssd", "step"]


def step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x ``(batch, H, P)``; dt ``(batch, H)``; B, C ``(batch, G, N)``; h ``(batch, H, P, N)``."""
    repeats = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, 1)[:, :, None], C.repeat_interleave(repeats, 1)[:, :, None]  # (batch, H, 1, N)
    h = torch.exp(dt * A)[..., None, None] * h + (dt[..., None] * x)[..., None] * B
    return (h * C).sum(-1), h


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens, T ≥ 1. A token with dt = 0 leaves the state as it is, which is how padding is served."""
    outputs = []
    for now in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        y, h = step(now[0], now[1], A, now[2], now[3], h)
        outputs.append(y)
    return torch.stack(outputs, 1), h
