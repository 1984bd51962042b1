"""Causal depthwise convolution: every channel of a step is a weighted sum of its last W samples.

Legend: B batch, T time, C channels, W window, n packed sequences.

    y_t = act(bias + Σ_{j<W} weight[:, W-1-j] ⊙ x_{t-j}),   x before the start: state (zeros)

As in Dao-AILab's `causal-conv1d`: the newest sample meets ``weight[:, -1]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.causal_conv1d import native, parallel, reference, triton
from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes, start_state
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps
from statewise.ops.steps import STEPS, by_kernel

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
        x: samples ``(B, T, C)``.
        weight: ``(C, W)``, W ≥ 1; ``weight[:, -1]`` meets the newest sample.
        bias: ``(C,)``; ``None`` means zero.
        activation: ``None``, ``"silu"`` or its other name ``"swish"``.
        state: the W-1 samples before the first ``(B, W-1, C)`` (packed: ``(n, W-1, C)``), oldest first, as they were
            given to the convolution; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` (W up to 8) or ``"triton"``.

    Returns:
        y ``(B, T, C)`` of x's dtype, and the last W-1 samples, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    op = "causal_conv1d"
    batch, time, width = check_arguments(op, x, "B T C", weight, bias, activation)
    rows = check_ragged(op, lengths, cu_seqlens, batch, time, x.device)
    form = choose(op, backend, x.device)
    if form == "native" and width > native.MOST_TAPS:
        if backend is not None:
            raise ValueError(f"{op}: backend 'native' serves W up to {native.MOST_TAPS}; weight has W = {width}")
        form = "torch"
    dtype = accumulation_dtype(x, weight, bias)
    begin = start_state(op, state, (rows, width - 1, x.shape[-1]), x, dtype)
    if time == 0:
        return torch.zeros_like(x), begin
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if form == "native":
        where = spans(batch, time, lengths, cu_seqlens)
        y, end = native.causal_conv1d(x.to(activation_dtype(dtype, x)), weight, bias, activation, begin, where)
        return y.to(x.dtype), end
    if form == "triton":
        return triton.causal_conv1d(x, weight, bias, activation, begin, lengths, cu_seqlens)

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        (samples,), (window,) = inputs, leaves
        valid = None if counts is None else valid_steps(counts, samples.shape[1])
        samples = (samples if valid is None else blank(samples, valid)).to(dtype)
        if form == "reference":
            y, end = reference.causal_conv1d(samples, weight, bias, activation, window, counts)
        else:
            y = parallel.causal_conv1d(samples, weight, bias, activation, window)
            end = parallel.window_at(samples, window, counts)
        return (y if valid is None else blank(y, valid)).to(x.dtype), [end]

    if cu_seqlens is not None:
        y, (end,) = run_packed(run, [x], [begin], cu_seqlens)
    else:
        y, (end,) = run([x], [begin], lengths)
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
    """One sample: x ``(B, C)`` → y ``(B, C)`` and the window after it. Otherwise as :func:`causal_conv1d`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    op = "causal_conv1d_step"
    batch, _, width = check_arguments(op, x, "B C", weight, bias, activation)
    form = choose("causal_conv1d", backend, x.device)
    dtype = accumulation_dtype(x, weight, bias)
    window = start_state(op, state, (batch, width - 1, x.shape[-1]), x, dtype)
    if by_kernel(form, backend, x, weight, bias, window):
        y, window = STEPS["causal_conv1d"].pure(x, weight, bias, window, activation)
        return y, window
    y, window = reference.step(
        x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), activation, window
    )
    return y.to(x.dtype), window


def check_arguments(
    op: str, x: Tensor, letters: str, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[int, int, int]:
    """Batch, time (1 without a time axis) and width."""
    shapes = {"x": (x, letters), "weight": (weight, "C W")}
    sizes = check_shapes(op, **shapes) if bias is None else check_shapes(op, **shapes, bias=(bias, "C"))
    if sizes["W"] < 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; W is at least 1")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"{op}: activation is {activation!r}; accepted are None, 'silu', 'swish'")
    return sizes["B"], sizes.get("T", 1), sizes["W"]
