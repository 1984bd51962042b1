"""The selective scan: Mamba-1's diagonal state space, whose step size and projections depend on the input.

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, channels, N state size, G groups.

    h_t = exp(dt_t A) ⊙ h_{t-1} + (dt_t x_t) B_t         h ∈ R^{channels×N}
    y_t = h_t C_t + D x_t,  then times silu(z_t)

Source: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", eq. 2 and section 3.6.
As in the authors' code, A is discretised exactly and B by Euler's rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes, start_state
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps
from statewise.ops.selective_scan import native, parallel, reference, triton
from statewise.ops.steps import STEPS, by_kernel

__all__ = ["selective_scan", "selective_scan_step"]


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan over a whole sequence, continued from ``state``.

    Args:
        x: inputs ``(batch, T, channels)``.
        dt: step sizes ``(batch, T, channels)``, ≥ 0 once bias and softplus are applied.
        A: ``(channels, N)``, ≤ 0.
        B, C: ``(batch, T, N)``, or ``(batch, T, G, N)`` where group g serves channels g·(channels/G) onwards.
        D: skip weight ``(channels,)``; ``None`` means no skip.
        z: gate ``(batch, T, channels)``; ``None`` means no gate.
        dt_bias: ``(channels,)``, added to dt before anything else; ``None`` means zero.
        dt_softplus: whether dt goes through softplus (after the bias; the identity above 20).
        state: h ``(batch, channels, N)`` to continue from; ``None`` means zeros.
        lengths: ``(batch,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then is ``(n, channels, N)``.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"`` (N up to 256).

    Returns:
        y ``(batch, T, channels)`` of x's dtype, and h after the last token, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    batch, time, channels, N = check_arguments("selective_scan", "batch T", x, dt, A, B, C, D, z, dt_bias)
    rows = check_ragged("selective_scan", lengths, cu_seqlens, batch, time, x.device)
    chosen = choose("selective_scan", backend, x.device)
    if chosen == "triton" and not 1 <= N <= (most := triton.MOST_NUMBERS):
        if backend is not None:
            raise ValueError(f"selective_scan: backend 'triton' serves N from 1 to {most}; A has N = {N}")
        chosen = "torch"
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias)
    begin = start_state("selective_scan", state, (rows, channels, N), x, dtype)
    if time == 0:
        return torch.zeros_like(x), begin
    if B.dim() == 3:
        B, C = B[:, :, None], C[:, :, None]
    if chosen == "native":
        carried = activation_dtype(dtype, x, B, C, z)
        steps = dt.to(activation_dtype(dtype, x, dt, B, C, z))
        x_, B_, C_, z_ = (None if value is None else value.to(carried) for value in (x, B, C, z))
        y, last = native.selective_scan(
            [x_, steps, B_, C_, z_],
            [None if value is None else value.to(dtype) for value in (A, D, dt_bias)],
            dt_softplus,
            begin,
            spans(batch, time, lengths, cu_seqlens),
        )
        return y.to(x.dtype), last
    if chosen == "triton":
        wide = [None if value is None else value.to(dtype) for value in (A, D, dt_bias)]
        return triton.selective_scan([x, dt, B, C, z], wide, dt_softplus, begin, lengths, cu_seqlens)
    form = reference if chosen == "reference" else parallel

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        valid = None if counts is None else valid_steps(counts, inputs[0].shape[1])
        if valid is not None:
            inputs = [blank(value, valid) for value in inputs]
        x_, dt_, B_, C_, *gate = (value.to(dtype) for value in inputs)
        dt_ = _step_size(dt_, dt_bias, dt_softplus)
        if valid is not None:  # a step of size zero forgets nothing and adds nothing
            dt_ = blank(dt_, valid)
        y, end = form.selective_scan(x_, dt_, A.to(dtype), B_, C_, leaves[0])
        y = _finish(y, x_, D, gate[0] if gate else None).to(x.dtype)
        return (y if valid is None else blank(y, valid)), (end,)

    inputs = (x, dt, B, C) if z is None else (x, dt, B, C, z)
    if cu_seqlens is not None:
        y, (end,) = run_packed(run, inputs, (begin,), cu_seqlens)
    else:
        y, (end,) = run(inputs, (begin,), lengths)
    return y, end


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: no T axis anywhere, y ``(batch, channels)``. Otherwise as :func:`selective_scan`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    batch, _, channels, N = check_arguments("selective_scan_step", "batch", x, dt, A, B, C, D, z, dt_bias)
    form = choose("selective_scan", backend, x.device)
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias)
    begin = start_state("selective_scan_step", state, (batch, channels, N), x, dtype)
    if by_kernel(form, backend, x, dt, A, B, C, D, z, dt_bias, begin):
        y, end = STEPS["selective_scan"].pure(x, dt, A, B, C, D, z, dt_bias, begin, dt_softplus)
        return y, end
    if B.dim() == 2:
        B, C = B[:, None], C[:, None]
    x_ = x.to(dtype)
    size = _step_size(dt.to(dtype), dt_bias, dt_softplus)
    y, end = reference.step(x_, size, A.to(dtype), B.to(dtype), C.to(dtype), begin)
    return _finish(y, x_, D, None if z is None else z.to(dtype)).to(x.dtype), end


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return F.softplus(dt) if softplus else dt


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + D.to(y.dtype) * x
    return y if z is None else y * F.silu(z)


def check_arguments(
    op: str,
    lead: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
) -> tuple[int, int, int, int]:
    """Sizes batch, T (1 for a step), channels and N."""
    grouped = isinstance(B, Tensor) and B.dim() == len(lead.split()) + 2
    matrix = f"{lead} G N" if grouped else f"{lead} N"
    per_channel = {name: (value, "channels") for name, value in (("D", D), ("dt_bias", dt_bias)) if value is not None}
    gate = {} if z is None else {"z": (z, f"{lead} channels")}
    sizes = check_shapes(
        op,
        x=(x, f"{lead} channels"),
        dt=(dt, f"{lead} channels"),
        A=(A, "channels N"),
        B=(B, matrix),
        C=(C, matrix),
        **per_channel,
        **gate,
    )
    groups = sizes.get("G", 1)
    if groups < 1 or sizes["channels"] % groups:
        raise ValueError(f"{op}: B and C have {groups} groups, which do not divide {sizes['channels']} channels")
    return sizes["batch"], sizes.get("T", 1), sizes["channels"], sizes["N"]
