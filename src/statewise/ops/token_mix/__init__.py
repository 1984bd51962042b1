"""Token mix: mixtures of every token with the one before it, several at once. Token shift with what follows it.

Legend: B batch, T time, C channels, M mixtures, n packed sequences.

    y_m,t = x_t + (x_{t-1} - x_t) ⊙ mix_m,   x before the start: state (zeros)

RWKV-6 and 7 hold ``mix`` as it is here; RWKV-4 and 5 hold ``1 - mix``, the share of the present token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes, start_state
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, valid_steps
from statewise.ops.steps import STEPS, by_kernel
from statewise.ops.token_mix import native, triton
from statewise.ops.token_shift import token_shift, token_shift_step

__all__ = ["token_mix", "token_mix_step"]


def token_mix(
    x: Tensor,
    mix: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """All mixtures over a whole sequence.

    Args:
        x: ``(B, T, C)``.
        mix: ``(M, C)``, M ≥ 1: how much of the token before each mixture takes.
        state: ``(B, C)`` (packed: ``(n, C)``), the input before the first step; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"`` (the same lines), ``"native"`` or ``"triton"``.

    Returns:
        M tensors ``(B, T, C)`` of x's dtype, and the last input of every sequence, float32 (float64
        if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = check_shapes("token_mix", x=(x, "B T C"), mix=(mix, "M C"))
    if not sizes["M"]:
        raise ValueError(f"token_mix: mix has shape {tuple(mix.shape)}; M is at least 1")
    form = choose("token_mix", backend, x.device)
    if form not in ("native", "triton"):
        before, last = token_shift(x, state, lengths=lengths, cu_seqlens=cu_seqlens)
        return _mixtures(x, before, mix, lengths), last
    rows = check_ragged("token_mix", lengths, cu_seqlens, sizes["B"], sizes["T"], x.device)
    dtype = accumulation_dtype(x, mix)
    state = start_state("token_mix", state, (rows, sizes["C"]), x, dtype)
    if sizes["T"] == 0:
        return tuple(torch.zeros_like(x) for _ in mix), state
    if form == "triton":
        return triton.token_mix(x, mix.to(dtype), state, lengths, cu_seqlens)
    where = spans(sizes["B"], sizes["T"], lengths, cu_seqlens)
    outputs, last = native.token_mix(x.to(activation_dtype(dtype, x)), mix.to(dtype), state, where)
    return tuple(y.to(x.dtype) for y in outputs), last


def token_mix_step(
    x: Tensor, mix: Tensor, state: Tensor | None = None, *, backend: str | None = None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """One token: x ``(B, C)`` → its mixtures ``(B, C)``, and x as the new state. Otherwise as :func:`token_mix`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    check_shapes("token_mix_step", x=(x, "B C"), mix=(mix, "M C"))
    form = choose("token_mix", backend, x.device)
    if by_kernel(form, backend, x, mix, state):
        begin = start_state("token_mix_step", state, tuple(x.shape), x, accumulation_dtype(x, mix))
        y, last = STEPS["token_mix"].pure(x, mix, begin)
        return y.unbind(0), last
    before, last = token_shift_step(x, state)
    return _mixtures(x, before, mix, None), last


def _mixtures(x: Tensor, before: Tensor, mix: Tensor, lengths: Tensor | None) -> tuple[Tensor, ...]:
    if lengths is not None:  # what is past a row's end may be anything; a shift has blanked its part already
        x = blank(x, valid_steps(lengths, x.shape[1]))
    dtype = accumulation_dtype(x, mix)
    wide = x.to(dtype)
    change = before.to(dtype) - wide
    return tuple((wide + change * m).to(x.dtype) for m in mix.to(dtype).unbind(0))
