"""The equation as a loop over time: slow, obvious, and right by definition.

Legend: batch, T time, H heads, P width of a head, N state size, G groups, R rank, S rotary angles.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["mamba3", "rotate", "step"]

TURN = 2 * math.pi


def rotate(x: Tensor, angle: Tensor, halved: bool) -> Tensor:
    """Rotate S pairs of the N entries of x ``(..., N)`` by angle ``(..., S)``: entries 2i and 2i+1, or, ``halved``, i
    and i + N/2. The others stay."""
    S, half = angle.shape[-1], x.shape[-1] // 2
    cos, sin = torch.cos(angle), torch.sin(angle)
    if halved:
        a, b = x[..., :S], x[..., half : half + S]
        return torch.cat([a * cos - b * sin, x[..., S:half], a * sin + b * cos, x[..., half + S :]], -1)
    a, b = x[..., : 2 * S : 2], x[..., 1 : 2 * S : 2]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned, x[..., 2 * S :]], -1)


def step(
    C: Tensor,
    B: Tensor,
    v: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    turn: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    halved: bool,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """One token: C, B ``(batch, R, G, N)``; v ``(batch, R, H, P)``; log_decay, dt, trap (a fraction) ``(batch, H)``;
    turn, what the angle moves by, ``(batch, H, S)``; biases ``(H, R, N)``; state as in the caller, but v with ranks."""
    angle, h, k_before, v_before = state
    angle = torch.remainder(angle + turn, TURN)
    repeats = v.shape[2] // C.shape[2]
    q = rotate(C.repeat_interleave(repeats, 2) + C_bias.transpose(0, 1), angle[:, None], halved)
    k = rotate(B.repeat_interleave(repeats, 2) + B_bias.transpose(0, 1), angle[:, None], halved)
    before = torch.einsum("brhp,brhn->bhpn", v_before, k_before)
    now = torch.einsum("brhp,brhn->bhpn", v, k)
    alpha, late, early = (size[..., None, None] for size in (torch.exp(log_decay), (1 - trap) * dt, trap * dt))
    h = alpha * (h + late * before) + early * now
    return torch.einsum("bhpn,brhn->brhp", h, q), (angle, h, k, v)


def mamba3(
    C: Tensor,
    B: Tensor,
    v: Tensor,
    log_decay: Tensor,
    dt: Tensor,
    trap: Tensor,
    turn: Tensor,
    C_bias: Tensor,
    B_bias: Tensor,
    halved: bool,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens, T ≥ 1 → y ``(batch, T, R, H, P)``, angle and h. A token with dt = 0 and no turn leaves both as they
    are, which is how padding is served."""
    outputs = []
    over_time = (value.unbind(1) for value in (C, B, v, log_decay, dt, trap, turn))
    for c, b, now, log_alpha, size, share, by in zip(*over_time, strict=True):
        y, state = step(c, b, now, log_alpha, size, share, by, C_bias, B_bias, halved, state)
        outputs.append(y)
    return torch.stack(outputs, 1), state[0], state[1]
