"""The equation as a loop over time: slow, obvious, and right by definition.

Every exponent is taken relative to the largest one met so far, so no key is too large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.state import WKV4State

__all__ = ["step", "wkv4"]


def step(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State) -> tuple[Tensor, WKV4State]:
    """One token; k, v ``(B, C)``."""
    num, den, largest = state
    # The average as it stands, with the present token at its bonus.
    top = torch.maximum(largest, u + k)
    old, now = torch.exp(largest - top), torch.exp(u + k - top)
    y = (old * num + now * v) / (old * den + now)
    # Forget a little, then take the token in.
    faded = largest + log_w
    top = torch.maximum(faded, k)
    old, now = torch.exp(faded - top), torch.exp(k - top)
    return y, WKV4State(old * num + now * v, old * den + now, top)


def wkv4(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State, lengths: Tensor | None
) -> tuple[Tensor, WKV4State]:
    """All tokens of ``(B, T, C)``, T ≥ 1; rows stop at ``lengths``."""
    outputs = []
    for t, (key, value) in enumerate(zip(k.unbind(1), v.unbind(1), strict=True)):
        y, new = step(key, value, log_w, u, state)
        if lengths is not None:
            alive = (t < lengths)[:, None]
            new = WKV4State(*[torch.where(alive, after, before) for after, before in zip(new, state, strict=True)])
        outputs.append(y)
        state = new
    return torch.stack(outputs, 1), state
