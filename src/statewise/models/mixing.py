"""What the RWKVs share on the way from a block's normed input to its projections."""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.token_mix import token_mix_step

__all__ = ["for_projections", "mix_one"]


def for_projections(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast gives a projection's input; ``x`` itself outside of autocast.

    A block's normed input is mixed several times over and every mixture projected. Under autocast norms return float32,
    and each mixture would be written wide, read again and rounded: rounded before, it is mixed at half the traffic.
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def mix_one(x: Tensor, mix: Tensor, state: Tensor | None) -> tuple[tuple[Tensor, ...], Tensor]:
    """:func:`token_mix` for T = 1, by its step form."""
    mixtures, last = token_mix_step(x[:, 0], mix, state)
    return tuple(y[:, None] for y in mixtures), last
