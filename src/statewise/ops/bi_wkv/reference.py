"""The equation as it is written, one output after another: work and memory grow with T². Right by definition."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["bi_wkv"]


def bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """All tokens of ``(B, T, C)``, T ≥ 1."""
    time = k.shape[1]
    places = torch.arange(time, device=k.device)
    outputs = []
    for t in range(time):
        between = ((places - t).abs() - 1)[:, None]  # tokens strictly between; -1 at t itself
        # neighbours are set apart because 0·(-inf) is NaN
        faded = torch.where(between > 0, between.clamp(min=1).to(k.dtype) * log_w, 0.0)
        # softmax: the exponentials over their sum, the largest exponent taken out
        weights = torch.softmax(k + torch.where(between < 0, u, faded), 1)
        outputs.append((weights * v).sum(1))
    return torch.stack(outputs, 1)
