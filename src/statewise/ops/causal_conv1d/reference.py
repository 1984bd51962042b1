"""The equation as a loop over time."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_conv1d", "step"]


def step(x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x ``(B, C)``, window ``(B, W-1, C)``."""
    seen = torch.cat([window, x[:, None]], 1)  # (B, W, C), oldest first
    y = (seen * weight.t()).sum(1)
    return (y if bias is None else y + bias), seen[:, 1:]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of ``(B, T, C)``, T ≥ 1; windows stop at ``lengths``."""
    outputs = []
    for t, now in enumerate(x.unbind(1)):
        y, new = step(now, weight, bias, window)
        window = new if lengths is None else torch.where((t < lengths)[:, None, None], new, window)
        outputs.append(y)
    return torch.stack(outputs, 1), window
