"""The equation as a loop over time: slow, obvious, and right by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["step", "wkv7"]


def step(token: Sequence[Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of r, log_w, k, v, a, b: v ``(B, H, V)``, the others ``(B, H, K)``; state ``(B, H, K, V)``."""
    r, log_w, k, v, a, b = token
    seen = (a[..., None] * state).sum(-2)  # aᵀ S, (B, H, V)
    state = (
        torch.exp(log_w)[..., None] * state  # forget
        + b[..., None] * seen[..., None, :]  # replace what a finds
        + k[..., None] * v[..., None, :]  # learn
    )
    return (r[..., None] * state).sum(-2), state


def wkv7(inputs: Sequence[Tensor], state: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """All tokens of r, log_w, k, v, a, b, each ``(B, T, H, ·)``, T ≥ 1; rows stop at ``lengths``."""
    outputs = []
    for t, token in enumerate(zip(*[x.unbind(1) for x in inputs], strict=True)):
        y, new = step(token, state)
        state = new if lengths is None else torch.where((t < lengths)[:, None, None, None], new, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state
