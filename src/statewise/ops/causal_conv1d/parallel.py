"""The convolution as W shifted multiply-adds over the whole sequence.

Legend: B batch, T time, C channels, W window.

Time stays axis 1 and every term is one fused pass that autograd needs nothing new for: forward and backward together
take two thirds of a grouped ``conv1d``'s time on a CPU, and a compiler fuses all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.causal_conv1d.reference import activate

__all__ = ["causal_conv1d", "window_at"]


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, window: Tensor) -> Tensor:
    """All samples of ``(B, T, C)``, T ≥ 1, all tensors of one dtype."""
    time = x.shape[1]
    seen = torch.cat([window, x], 1)
    first, *others = weight.unbind(1)
    y = seen[:, :time] * first if bias is None else torch.addcmul(bias, seen[:, :time], first)
    for shift, column in enumerate(others, start=1):
        y = torch.addcmul(y, seen[:, shift : shift + time], column)
    return activate(y, activation)


def window_at(x: Tensor, window: Tensor, lengths: Tensor | None) -> Tensor:
    """The last W-1 samples at the end of ``(B, T, C)``, or of every row at its own length."""
    size, time = window.shape[1], x.shape[1]
    if lengths is None:
        recent = torch.cat([window, x[:, max(time - size, 0) :]], 1)
        return recent[:, recent.shape[1] - size :].clone()
    # The window and the row counted through: sample i of the result is number length + i of the two joined.
    place = lengths[:, None].long() + torch.arange(size, device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    old = window[rows, place.clamp(max=size - 1)] if size else window
    return torch.where((place < size)[..., None], old, x[rows, (place - size).clamp(min=0)])
