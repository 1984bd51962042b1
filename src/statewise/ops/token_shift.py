"""Token shift: every step sees the input of the step before it.

Legend: B batch, T time, C channels, n packed sequences.

    y_t = x_{t-1},   x_0 = state (zeros at the start)
"""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.checks import accumulation_dtype, check_shapes, check_state, start_state
from statewise.ops.dispatch import choose
from statewise.ops.ragged import blank, check_ragged, valid_steps

__all__ = ["token_shift", "token_shift_step"]


def token_shift(
    x: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Shift a sequence by one step. The reference is already parallel in time: every backend runs the same lines.

    There is no kernel on a GPU: it is a copy, which torch makes as fast, and a compiler joins it with what follows.
    Where mixtures would read it many times there is :func:`~statewise.ops.token_mix`.

    Args:
        x: ``(B, T, C)``.
        state: ``(B, C)`` (packed: ``(n, C)``), the input before the first step; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows.
        cu_seqlens: ``(n + 1,)`` int64, packed sequences in one row.
        backend: see :func:`statewise.ops.backends`.

    Returns:
        y ``(B, T, C)`` of x's dtype, and the last input of every sequence, float32 (float64 for float64 x).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value.
    """
    sizes = check_shapes("token_shift", x=(x, "B T C"))
    batch, time, channels = sizes["B"], sizes["T"], sizes["C"]
    rows = check_ragged("token_shift", lengths, cu_seqlens, batch, time, x.device)
    choose("token_shift", backend, x.device)
    dtype = accumulation_dtype(x)
    state = start_state("token_shift", state, (rows, channels), x, dtype)
    if time == 0:
        return torch.zeros_like(x), state
    first = state.to(x.dtype)
    if cu_seqlens is not None:
        steps = torch.arange(time, device=x.device)
        bounds = cu_seqlens.long()
        # The last boundary at or before a step starts its sequence; empty sequences lose the tie.
        owner = torch.searchsorted(bounds, steps, right=True) - 1
        shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        y = torch.where((steps == bounds[owner])[:, None], first[owner], shifted[0])[None]
        last = x[0, (bounds[1:] - 1).clamp(min=0)].to(dtype)
        return y, torch.where((bounds[1:] > bounds[:-1])[:, None], last, state)
    if lengths is None:
        return torch.cat([first[:, None], x[:, :-1]], 1), x[:, -1].to(dtype, copy=True)
    valid = valid_steps(lengths, time)
    x = blank(x, valid)
    y = blank(torch.cat([first[:, None], x[:, :-1]], 1), valid)
    last = x[torch.arange(batch, device=x.device), (lengths - 1).clamp(min=0)].to(dtype)
    return y, torch.where((lengths > 0)[:, None], last, state)


def token_shift_step(x: Tensor, state: Tensor | None = None, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """One step: x ``(B, C)`` → the step before it, and x as the new state. Otherwise as :func:`token_shift`."""
    sizes = check_shapes("token_shift_step", x=(x, "B C"))
    choose("token_shift", backend, x.device)
    dtype = accumulation_dtype(x)
    if state is None:
        return torch.zeros_like(x), x.to(dtype, copy=True)
    check_state("token_shift_step", "state", state, (sizes["B"], sizes["C"]), x.device)
    return state.to(x.dtype, copy=True), x.to(dtype, copy=True)
