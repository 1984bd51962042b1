"""The equation as a loop over time: slow, obvious, and right by definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["activate", "causal_conv1d", "step"]


def activate(y: Tensor, activation: str | None) -> Tensor:
    """The activation, in one place for all forms."""
    return y if activation is None else torch.nn.functional.silu(y)


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, window: Tensor
) -> tuple[Tensor, Tensor]:
    """One sample; x ``(B, C)``, window ``(B, W-1, C)``."""
    seen = torch.cat([window, x[:, None]], 1)
    y = (seen * weight.t()).sum(1)
    return activate(y if bias is None else y + bias, activation), seen[:, 1:].clone()


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, window: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All samples of ``(B, T, C)``, T ≥ 1; windows stop at ``lengths``."""
    outputs = []
    for t, sample in enumerate(x.unbind(1)):
        y, new = step(sample, weight, bias, activation, window)
        if lengths is not None:
            new = torch.where((t < lengths)[:, None, None], new, window)
        outputs.append(y)
        window = new
    return torch.stack(outputs, 1), window
