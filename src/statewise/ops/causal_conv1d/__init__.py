"""Causal depthwise convolution over time.

Legend: B batch, T time, C channels, W window width, n packed sequences.

    y_t = act(bias + Σ_{j<W} weight[:, W-1-j] ⊙ x_{t-j})

The newest sample meets ``weight[:, -1]``; before the first step lie W-1 samples of the state (zeros at the start).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.ops.causal_conv1d import parallel, reference
from statewise.ops.checks import accumulation_dtype, check_shapes, check_state
from statewise.ops.dispatch import choose
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps

__all__ = ["causal_conv1d", "causal_conv1d_step"]


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution over a whole sequence, continued from ``state``.

    Args:
        x: ``(B, T, C)``.
        weight: ``(C, W)``.
        bias: ``(C,)``; ``None`` means none.
        activation: ``None``, ``"silu"`` or its other name ``"swish"``.
        state: the last W-1 inputs ``(B, W-1, C)``, oldest first, before the convolution; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then is ``(n, W-1, C)``.
        backend: ``None`` (fastest), ``"reference"`` or ``"torch"``.

    Returns:
        y ``(B, T, C)`` of x's dtype, and the last W-1 inputs, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = _check("causal_conv1d", "B T C", x, weight, bias, activation)
    rows = check_ragged("causal_conv1d", lengths, cu_seqlens, sizes["B"], sizes["T"], x.device)
    form = reference if choose("causal_conv1d", backend) == "reference" else parallel
    dtype = accumulation_dtype(x, weight, bias)
    begin = _start("causal_conv1d", state, (rows, sizes["W"] - 1, sizes["C"]), x, dtype)
    if sizes["T"] == 0:
        return torch.zeros_like(x), begin
    taps, offset = weight.to(dtype), None if bias is None else bias.to(dtype)

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        (samples,) = inputs
        valid = None if counts is None else valid_steps(counts, samples.shape[1])
        if valid is not None:
            samples = blank(samples, valid)
        y, end = form.causal_conv1d(samples.to(dtype), taps, offset, leaves[0], counts)
        y = (y if activation is None else F.silu(y)).to(x.dtype)
        return (y if valid is None else blank(y, valid)), (end,)

    if cu_seqlens is not None:
        y, (end,) = run_packed(run, (x,), (begin,), cu_seqlens)
    else:
        y, (end,) = run((x,), (begin,), lengths)
    return y, end


def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: x ``(B, C)`` → y ``(B, C)`` and the window after it. Otherwise as :func:`causal_conv1d`."""
    sizes = _check("causal_conv1d_step", "B C", x, weight, bias, activation)
    choose("causal_conv1d", backend)
    dtype = accumulation_dtype(x, weight, bias)
    begin = _start("causal_conv1d_step", state, (sizes["B"], sizes["W"] - 1, sizes["C"]), x, dtype)
    y, end = reference.step(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), begin)
    return (y if activation is None else F.silu(y)).to(x.dtype), end


def _check(
    op: str, spec: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> dict[str, int]:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation is {activation!r}; accepted are None, 'silu', 'swish'")
    optional = {} if bias is None else {"bias": (bias, "C")}
    sizes = check_shapes(op, x=(x, spec), weight=(weight, "C W"), **optional)
    if sizes["W"] < 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; the window is at least one sample wide")
    return sizes


def _start(op: str, state: Tensor | None, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype) -> Tensor:
    if state is None:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    check_state(op, "state", state, shape, x.device)
    return state.to(dtype)
