"""SSD: Mamba-2's state space, a selective scan whose decay is one number a head, so that heads are matrix products.

Legend (B and C are the paper's matrices, so sizes are spelled out): batch, T time, H heads, P width of a head, N state
size, G groups.

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_tᵀ         h ∈ R^{P×N} for every head
    y_t = h_t C_t + D x_t,  then times silu(z_t)

Source: Dao and Gu 2024, "Transformers are SSMs", eq. 16 and section 6. dt takes its bias, then softplus, then the
clamp.
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
from statewise.ops.ssd import native, parallel, reference, triton
from statewise.ops.steps import STEPS, by_kernel

__all__ = ["ssd", "ssd_step"]


def ssd(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan over a whole sequence, continued from ``state``.

    Args:
        x: inputs ``(batch, T, H, P)``.
        dt: step sizes ``(batch, T, H)``, before bias, softplus and clamp.
        A: ``(H,)``, ≤ 0.
        B, C: ``(batch, T, G, N)``; group g serves heads g·(H/G) onwards.
        D: skip weight ``(H,)`` or ``(H, P)``; ``None`` means no skip.
        z: gate ``(batch, T, H, P)``; ``None`` means no gate.
        dt_bias: ``(H,)``, added to dt before anything else; ``None`` means zero.
        dt_softplus: whether dt goes through softplus (after the bias; the identity above 20).
        dt_limit: smallest and largest step size; what lies outside is clamped and has no gradient.
        state: h ``(batch, H, P, N)`` to continue from; ``None`` means zeros.
        lengths: ``(batch,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then is ``(n, H, P, N)``.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"`` (N up to 256).

    Returns:
        y ``(batch, T, H, P)`` of x's dtype, and h after the last token, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = check_arguments("ssd", "batch T", x, dt, A, B, C, D, z, dt_bias, dt_limit)
    batch, time = sizes["batch"], sizes["T"]
    rows = check_ragged("ssd", lengths, cu_seqlens, batch, time, x.device)
    chosen = choose("ssd", backend, x.device)
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias)
    begin = start_state("ssd", state, (rows, sizes["H"], sizes["P"], sizes["N"]), x, dtype)
    if time == 0:
        return torch.zeros_like(x), begin
    if chosen == "triton" and sizes["N"] > triton.MOST_STATES:
        if backend is not None:
            raise ValueError(f"ssd: backend 'triton' serves N up to {triton.MOST_STATES}; B has N = {sizes['N']}")
        chosen = "torch"
    if chosen in ("native", "triton"):
        if lengths is not None:  # the one input that torch computes with where the kernel never looks
            dt = blank(dt, valid_steps(lengths, time))
        size = _step_size(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
        skip = None if D is None else (D if D.dim() == 2 else D[:, None].expand(x.shape[2:])).to(dtype)
    if chosen == "triton":
        return triton.ssd([x, size, B, C, z], A.to(dtype), skip, begin, lengths, cu_seqlens)
    if chosen == "native":
        carried = activation_dtype(dtype, x, B, C, z)
        x_, B_, C_, z_ = (None if value is None else value.to(carried) for value in (x, B, C, z))
        y, end = native.ssd(
            [x_, size, B_, C_, z_],
            A.to(dtype),
            skip,
            begin,
            spans(batch, time, lengths, cu_seqlens),
        )
        return y.to(x.dtype), end
    form = reference if chosen == "reference" else parallel

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        valid = None if counts is None else valid_steps(counts, inputs[0].shape[1])
        if valid is not None:
            inputs = [blank(value, valid) for value in inputs]
        x_, dt_, B_, C_, *gate = (value.to(dtype) for value in inputs)
        dt_ = _step_size(dt_, dt_bias, dt_softplus, dt_limit)
        if valid is not None:  # a step of size zero forgets nothing and adds nothing
            dt_ = blank(dt_, valid)
        y, end = form.ssd(x_, dt_, A.to(dtype), B_, C_, leaves[0])
        y = _finish(y, x_, D, gate[0] if gate else None).to(x.dtype)
        return (y if valid is None else blank(y, valid)), (end,)

    inputs = (x, dt, B, C) if z is None else (x, dt, B, C, z)
    if cu_seqlens is not None:
        y, (end,) = run_packed(run, inputs, (begin,), cu_seqlens)
    else:
        y, (end,) = run(inputs, (begin,), lengths)
    return y, end


def ssd_step(
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
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    state: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: no T axis anywhere, y ``(batch, H, P)``. Otherwise as :func:`ssd`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    sizes = check_arguments("ssd_step", "batch", x, dt, A, B, C, D, z, dt_bias, dt_limit)
    form = choose("ssd", backend, x.device)
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias)
    begin = start_state("ssd_step", state, (sizes["batch"], sizes["H"], sizes["P"], sizes["N"]), x, dtype)
    if by_kernel(form, backend, x, dt, A, B, C, D, z, dt_bias, begin):
        y, end = STEPS["ssd"].pure(x, dt, A, B, C, D, z, dt_bias, begin, dt_softplus, list(dt_limit))
        return y, end
    x_, size = x.to(dtype), _step_size(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    y, end = reference.step(x_, size, A.to(dtype), B.to(dtype), C.to(dtype), begin)
    return _finish(y, x_, D, None if z is None else z.to(dtype)).to(x.dtype), end


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool, limit: tuple[float, float]) -> Tensor:
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return (F.softplus(dt) if softplus else dt).clamp(*limit)


def _finish(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    if D is not None:
        y = y + (D if D.dim() == 2 else D[:, None]).to(y.dtype) * x
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
    dt_limit: tuple[float, float],
) -> dict[str, int]:
    """Size by letter."""
    optional: dict[str, tuple[Tensor, str]] = {}
    if D is not None:
        optional["D"] = (D, "H P" if isinstance(D, Tensor) and D.dim() == 2 else "H")
    if z is not None:
        optional["z"] = (z, f"{lead} H P")
    if dt_bias is not None:
        optional["dt_bias"] = (dt_bias, "H")
    sizes = check_shapes(
        op,
        x=(x, f"{lead} H P"),
        dt=(dt, f"{lead} H"),
        A=(A, "H"),
        B=(B, f"{lead} G N"),
        C=(C, f"{lead} G N"),
        **optional,
    )
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise ValueError(f"{op}: B and C have {sizes['G']} groups, which do not divide {sizes['H']} heads")
    pair = isinstance(dt_limit, (tuple, list)) and [isinstance(end, (int, float)) for end in dt_limit] == [True, True]
    if not pair or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{op}: dt_limit is {dt_limit!r}; accepted are two numbers, 0 ≤ smallest ≤ largest")
    return sizes
