"""Mamba-3 in chunks: one term a token once the half step is moved, then matrix products, then from chunk to chunk the
state.

Legend: batch, t tokens of one segment, which is one chunk; H heads, P width of a head, N state size, R rank, G groups.
The derivation is in README.md beside this file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.ops.mamba3.reference import TURN, rotate
from statewise.ops.segments import register_segmented

__all__ = ["mamba3"]

_CHUNK = 64
_CHUNK_RANKS = 16  # a chunk's scores are t·R by t·R


def _between(log_decay: Tensor) -> Tensor:
    """``(..., t)`` → ``(..., t, t)``: the decay from after token j through token i; zero above the diagonal.

    Summed from j on, not as a difference of two sums from the start: far into a chunk that difference would keep
    rounding errors of decays long gone."""
    t = log_decay.shape[-1]
    below = torch.ones(t, t, dtype=torch.bool, device=log_decay.device).tril(-1)
    return torch.exp(torch.where(below, log_decay[..., None], 0.0).cumsum(-2)).tril()


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], leaves: Sequence[Tensor], *, halved: bool
) -> tuple[Tensor, list[Tensor]]:
    C, B, v, log_decay, early, late, turn = inputs
    angle, state = leaves
    batch, t, ranks, heads, width = v.shape
    size = C.shape[-1]

    angles = (angle[:, None] + turn.cumsum(1)).transpose(1, 2)[:, :, :, None]  # (batch, H, t, 1, S)

    def turned(x: Tensor, bias: Tensor) -> Tensor:
        """``(batch, t, R, G, N)`` → ``(batch, H, t·R, N)``."""
        per_head = x.repeat_interleave(heads // x.shape[3], 3).permute(0, 3, 1, 2, 4) + bias[:, None]
        return rotate(per_head, angles, halved).reshape(batch, heads, t * ranks, size)

    q, k = turned(C, parameters[0]), turned(B, parameters[1])
    values = v.permute(0, 3, 1, 2, 4).reshape(batch, heads, t * ranks, width)
    log_decay, early, late = (x.transpose(1, 2) for x in (log_decay, early, late))  # (batch, H, t)
    decays = _between(log_decay)
    weights = decays * (early + late)[:, :, None]
    own = torch.eye(t, dtype=torch.bool, device=v.device)
    present = torch.where(own, early[:, :, None], weights)  # a token's own late half comes with the next one
    scores = (q @ k.transpose(-1, -2)).view(batch, heads, t, ranks, t, ranks) * present[:, :, :, None, :, None]
    upto = torch.exp(log_decay.cumsum(-1))  # what the state at the chunk's start still weighs at each token
    past = (q @ state.transpose(-1, -2)).view(batch, heads, t, ranks, width) * upto[..., None, None]
    y = (scores.view(batch, heads, t * ranks, t * ranks) @ values).view(batch, heads, t, ranks, width) + past

    rest = weights[:, :, -1].repeat_interleave(ranks, -1)[..., None]  # what each token still weighs at the end
    end = state * upto[..., -1, None, None] + (values * rest).transpose(-1, -2) @ k
    return y.permute(0, 2, 3, 1, 4), [torch.remainder(angles[:, :, -1, 0], TURN), end]


def _register(name: str, halved: bool, segment: int) -> Callable[..., tuple[Tensor, ...]]:
    return register_segmented(
        name,
        partial(_segment, halved=halved),
        time=("C", "B", "v", "log_decay", "early", "late", "turn"),
        shared=("C_bias", "B_bias"),
        state=("angle", "state"),
        output="v",
        segment=segment,
    )


_FORMS = {False: _register("mamba3", False, _CHUNK), True: _register("mamba3_halved", True, _CHUNK_RANKS)}


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
    """All tokens, T ≥ 1; all tensors of one dtype; arguments and results as in the reference."""
    angle, h, k_before, v_before = state
    early, late = trap * dt, (1 - trap) * dt
    h = h + late[:, 0, :, None, None] * torch.einsum("brhp,brhn->bhpn", v_before, k_before)
    ahead = F.pad(late[:, 1:], (0, 0, 0, 1))
    y, angle, h = _FORMS[halved](C, B, v, log_decay, early, ahead, turn, C_bias, B_bias, angle, h)
    return y, angle, h
