"""What autocast would do to every projection's input, done once."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["for_projections"]


def for_projections(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives a projection's input; ``x`` itself outside of autocast.

    A block's normed input is mixed several times over and every mixture projected. Under autocast norms return float32,
    and each mixture would be written wide, read again and rounded: rounded before, it is mixed at half the traffic.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x
