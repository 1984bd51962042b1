"""WKV-4: RWKV-4's running average of values, weighted by ``exp(key)`` and forgetting at a fixed rate per channel.

Legend: B batch, T time, C channels, n packed sequences.

    y_t = (Σ_{i<t} e^{(t-1-i)·log_w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i<t} e^{(t-1-i)·log_w + k_i} + e^{u+k_t})

Source: Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", eq. 16. The published files store
``time_decay`` with ``log_w = -exp(time_decay)``, and ``u = time_first``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes, check_state
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps
from statewise.ops.steps import STEPS, by_kernel
from statewise.ops.wkv4 import native, parallel, reference, triton
from statewise.state import WKV4State

__all__ = ["wkv4", "wkv4_step"]


def wkv4(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: WKV4State | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, WKV4State]:
    """The average over a whole sequence, continued from ``state``.

    Args:
        k: keys ``(B, T, C)``; any finite size, since only differences of exponents are ever exponentiated.
        v: values ``(B, T, C)``.
        log_w: log decay per step ``(C,)``, ≤ 0.
        u: bonus of the present token, in log space ``(C,)``.
        state: where to continue; ``None`` means nothing seen yet (zero sums, maximum -inf).
        lengths: ``(B,)`` int64, right-padded rows: see the contract's section 3.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then has n rows.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Returns:
        y ``(B, T, C)`` of v's dtype, and the state after the last token, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = check_shapes("wkv4", k=(k, "B T C"), v=(v, "B T C"), log_w=(log_w, "C"), u=(u, "C"))
    batch, time = sizes["B"], sizes["T"]
    rows = check_ragged("wkv4", lengths, cu_seqlens, batch, time, k.device)
    form = choose("wkv4", backend, k.device)
    dtype = accumulation_dtype(k, v, log_w, u)
    begin = _start("wkv4", state, rows, k, dtype)
    if time == 0:
        return torch.zeros_like(v), begin
    log_w, u = log_w.to(dtype), u.to(dtype)
    if form == "native":
        carried = activation_dtype(dtype, k, v)
        where = spans(batch, time, lengths, cu_seqlens)
        y, end = native.wkv4(k.to(carried), v.to(carried), log_w, u, begin, where)
        return y.to(v.dtype), end
    if form == "triton":
        return triton.wkv4(k, v, log_w, u, begin, lengths, cu_seqlens)

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, WKV4State]:
        keys, values = inputs
        valid = None if counts is None else valid_steps(counts, keys.shape[1])
        if valid is not None:
            keys, values = blank(keys, valid), blank(values, valid)
        keys, values = keys.to(dtype), values.to(dtype)
        start = WKV4State(*leaves)
        if form == "reference":
            y, end = reference.wkv4(keys, values, log_w, u, start, counts)
        else:
            y, end = parallel.wkv4(keys, values, log_w, u, start)
            if counts is not None:
                end = parallel.state_at(keys, values, log_w, start, counts)
        return (y if valid is None else blank(y, valid)).to(v.dtype), end

    if cu_seqlens is not None:
        y, new = run_packed(run, (k, v), begin, cu_seqlens)
        return y, WKV4State(*new)
    return run((k, v), begin, lengths)


def wkv4_step(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State | None = None, *, backend: str | None = None
) -> tuple[Tensor, WKV4State]:
    """One token: k, v ``(B, C)`` → y ``(B, C)`` and the state after it. Otherwise as :func:`wkv4`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    sizes = check_shapes("wkv4_step", k=(k, "B C"), v=(v, "B C"), log_w=(log_w, "C"), u=(u, "C"))
    form = choose("wkv4", backend, k.device)
    dtype = accumulation_dtype(k, v, log_w, u)
    begin = _start("wkv4_step", state, sizes["B"], k, dtype)
    if by_kernel(form, backend, k, v, log_w, u, *begin):
        y, *leaves = STEPS["wkv4"].pure(k, v, log_w, u, *begin)
        return y, WKV4State(*leaves)
    y, end = reference.step(k.to(dtype), v.to(dtype), log_w.to(dtype), u.to(dtype), begin)
    return y.to(v.dtype), end


def _start(op: str, state: WKV4State | None, rows: int, k: Tensor, dtype: torch.dtype) -> WKV4State:
    shape = (rows, k.shape[-1])
    if state is None:
        zeros = torch.zeros(shape, dtype=dtype, device=k.device)
        return WKV4State(zeros, zeros.clone(), torch.full_like(zeros, -torch.inf))
    if not isinstance(state, tuple) or len(state) != 3:
        raise ValueError(f"{op}: state must be a WKV4State(num, den, max), got {type(state).__name__}")
    for name, leaf in zip(WKV4State._fields, state, strict=True):
        check_state(op, f"state.{name}", leaf, shape, k.device)
    return WKV4State(*[leaf.to(dtype) for leaf in state])
