"""The equation as a loop over time: slow, obvious, and right by definition."""

from __future__ import annotations

from itertools import repeat

import torch
from torch import Tensor

__all__ = ["step", "wkv6"]


def step(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: r, k ``(B, H, K)``, v ``(B, H, V)``, log_w ``(B, H, K)`` or ``(H, K)``, u ``(H, K)``."""
    learnt = k[..., None] * v[..., None, :]  # (B, H, K, V)
    y = (r[..., None] * (state + u[..., None] * learnt)).sum(-2)
    return y, torch.exp(log_w)[..., None] * state + learnt


def wkv6(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of ``(B, T, H, ·)``, T ≥ 1, log_w also ``(H, K)``; rows stop at ``lengths``."""
    decays = log_w.unbind(1) if log_w.dim() == 4 else repeat(log_w, r.shape[1])
    outputs = []
    for t, (read, decay, key, value) in enumerate(zip(r.unbind(1), decays, k.unbind(1), v.unbind(1), strict=True)):
        y, new = step(read, decay, key, value, u, state)
        state = new if lengths is None else torch.where((t < lengths)[:, None, None, None], new, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state
