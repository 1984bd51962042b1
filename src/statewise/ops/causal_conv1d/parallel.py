"""All steps at once: W shifted multiply-adds. Plain torch, which compiles and exports as it stands."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of ``(B, T, C)``, T ≥ 1, all tensors of one dtype."""
    time, width = x.shape[1], weight.shape[1]
    seen = torch.cat([window, x], 1)  # (B, W-1+T, C)
    y = seen[:, width - 1 :] * weight[:, -1]
    for at in range(width - 1):
        y = torch.addcmul(y, seen[:, at : at + time], weight[:, at])
    if bias is not None:
        y = y + bias
    if lengths is None:
        return y, seen[:, time:].clone()
    index = lengths[:, None].long() + torch.arange(width - 1, device=x.device)
    return y, seen.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
