"""WKV-7: a matrix per head that forgets, removes what it finds at ``a``, and learns ``k → v``.

Legend: B batch, T time, H heads, K key rows, V value columns, n packed sequences.

    S_t = (diag(exp log_w_t) + b_t a_tᵀ) S_{t-1} + k_t v_tᵀ        S ∈ R^{K×V}
    y_t = S_tᵀ r_t

Source: Peng et al. 2025, "RWKV-7 'Goose' with Expressive Dynamic State Evolution", eq. 16-17, transposed: the paper and
the published kernels keep S as (V, K). RWKV-7 uses a = -κ̂ and b = κ̂ ⊙ iclr with κ̂ of length one, and
log_w = -exp(-½)·sigmoid(w_raw); the operator takes any a and b.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes, start_state
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, run_packed, valid_steps
from statewise.ops.steps import STEPS, by_kernel
from statewise.ops.wkv7 import native, parallel, reference, triton

__all__ = ["wkv7", "wkv7_step"]


def wkv7(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole sequence, continued from ``state``.

    Args:
        r: receptance, what is read ``(B, T, H, K)``.
        log_w: log decay of each key row at each step ``(B, T, H, K)``, ≤ 0; -inf forgets the row.
        k: keys ``(B, T, H, K)``.
        v: values ``(B, T, H, V)``; V may differ from K.
        a: the direction looked up before it is replaced ``(B, T, H, K)``.
        b: where what ``a`` found is added back ``(B, T, H, K)``.
        state: S ``(B, H, K, V)`` to continue from; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows: outputs past a length are zero, the state is the one at the length.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then is ``(n, H, K, V)``.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"`` (K and V up to 128).

    Returns:
        y ``(B, T, H, V)`` of v's dtype, and S after the last token, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = check_shapes(
        "wkv7",
        r=(r, "B T H K"),
        log_w=(log_w, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        a=(a, "B T H K"),
        b=(b, "B T H K"),
    )
    rows = check_ragged("wkv7", lengths, cu_seqlens, sizes["B"], sizes["T"], r.device)
    form = choose("wkv7", backend, r.device)
    if form == "triton" and max(sizes["K"], sizes["V"]) > triton.MOST:
        if backend is not None:
            found = f"K = {sizes['K']} and V = {sizes['V']}"
            raise ValueError(f"wkv7: backend 'triton' serves K and V up to {triton.MOST}; inputs have {found}")
        form = "torch"
    dtype = accumulation_dtype(r, log_w, k, v, a, b)
    begin = start_state("wkv7", state, (rows, sizes["H"], sizes["K"], sizes["V"]), v, dtype)
    if sizes["T"] == 0:
        return torch.zeros_like(v), begin
    if form == "native":
        carried = activation_dtype(dtype, r, log_w, k, v, a, b)
        where = spans(sizes["B"], sizes["T"], lengths, cu_seqlens)
        y, last = native.wkv7([x.to(carried) for x in (r, log_w, k, v, a, b)], begin, where)
        return y.to(v.dtype), last
    if form == "triton":
        return triton.wkv7((r, log_w, k, v, a, b), begin, lengths, cu_seqlens)

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        valid = None if counts is None else valid_steps(counts, inputs[0].shape[1])
        if valid is not None:  # a step of zeros forgets nothing (log_w = 0) and adds nothing
            inputs = [blank(x, valid) for x in inputs]
        inputs = [x.to(dtype) for x in inputs]
        if form == "reference":
            y, end = reference.wkv7(inputs, leaves[0], counts)
        else:
            y, end = parallel.wkv7(inputs, leaves[0])
        return (y if valid is None else blank(y, valid)).to(v.dtype), (end,)

    if cu_seqlens is not None:
        y, (end,) = run_packed(run, (r, log_w, k, v, a, b), (begin,), cu_seqlens)
    else:
        y, (end,) = run((r, log_w, k, v, a, b), (begin,), lengths)
    return y, end


def wkv7_step(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: v ``(B, H, V)``, the others ``(B, H, K)`` → y ``(B, H, V)``, new S. Otherwise as :func:`wkv7`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    sizes = check_shapes(
        "wkv7_step",
        r=(r, "B H K"),
        log_w=(log_w, "B H K"),
        k=(k, "B H K"),
        v=(v, "B H V"),
        a=(a, "B H K"),
        b=(b, "B H K"),
    )
    form = choose("wkv7", backend, r.device)
    dtype = accumulation_dtype(r, log_w, k, v, a, b)
    begin = start_state("wkv7_step", state, (sizes["B"], sizes["H"], sizes["K"], sizes["V"]), v, dtype)
    if by_kernel(form, backend, r, log_w, k, v, a, b, begin):
        y, end = STEPS["wkv7"].pure(r, log_w, k, v, a, b, begin)
        return y, end
    y, end = reference.step([x.to(dtype) for x in (r, log_w, k, v, a, b)], begin)
    return y.to(v.dtype), end
