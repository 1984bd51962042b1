"""WKV-6: a matrix per head that forgets each key row at its own rate and learns ``k → v``. RWKV-5 and RWKV-6.

Legend: B batch, T time, H heads, K key rows, V value columns, n packed sequences.

    y_t = (S_{t-1} + diag(u) k_t v_tᵀ)ᵀ r_t                     S ∈ R^{K×V}
    S_t = diag(exp log_w_t) S_{t-1} + k_t v_tᵀ

A token reads what was there before it, and itself with the bonus u. RWKV-6: log_w = -exp(w_raw) anew for each token.
RWKV-5: one log_w for all tokens, per head and key row (5.2) or per head (5.0, 5.1).

Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence"
(Eagle is RWKV-5, Finch RWKV-6). The published kernels keep S as (V, K).
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
from statewise.ops.wkv6 import native, parallel, reference, triton

__all__ = ["wkv6", "wkv6_step"]


def wkv6(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over a whole sequence, continued from ``state``.

    Args:
        r: receptance, what is read ``(B, T, H, K)``.
        log_w: log decay per step, ≤ 0; -inf forgets the row. ``(B, T, H, K)``; or constant in time, ``(H, K)`` or
            ``(H,)``, the latter for all key rows of a head.
        k: keys ``(B, T, H, K)``.
        v: values ``(B, T, H, V)``; V may differ from K.
        u: bonus of the present token, a plain factor ``(H, K)``, or ``(H,)`` for all key rows of a head.
        state: S ``(B, H, K, V)`` to continue from; ``None`` means zeros.
        lengths: ``(B,)`` int64, right-padded rows: outputs past a length are zero, the state is the one at the length.
        cu_seqlens: ``(n + 1,)`` int64, sequences packed into one row; the state then is ``(n, H, K, V)``.
        backend: ``None`` (fastest), ``"reference"``, ``"torch"``, ``"native"`` or ``"triton"``.

    Returns:
        y ``(B, T, H, V)`` of v's dtype, and S after the last token, float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or a backend that cannot serve.
    """
    sizes = check_shapes(
        "wkv6",
        r=(r, "B T H K"),
        k=(k, "B T H K"),
        v=(v, "B T H V"),
        log_w=(log_w, letters(log_w, "B T H K")),
        u=(u, letters(u, "H K")),
    )
    rows = check_ragged("wkv6", lengths, cu_seqlens, sizes["B"], sizes["T"], r.device)
    form = choose("wkv6", backend, r.device)
    dtype = accumulation_dtype(r, log_w, k, v, u)
    begin = start_state("wkv6", state, (rows, sizes["H"], sizes["K"], sizes["V"]), v, dtype)
    if sizes["T"] == 0:
        return torch.zeros_like(v), begin
    log_w, bonus = _rows_of_heads(log_w, sizes["K"]), _rows_of_heads(u, sizes["K"]).to(dtype)
    if form == "native":
        carried = activation_dtype(dtype, r, k, v, log_w if log_w.dim() == 4 else None)
        where = spans(sizes["B"], sizes["T"], lengths, cu_seqlens)
        decays = log_w.to(carried if log_w.dim() == 4 else dtype)
        y, last = native.wkv6(r.to(carried), decays, k.to(carried), v.to(carried), bonus, begin, where)
        return y.to(v.dtype), last
    if form == "triton":
        decays = log_w if log_w.dim() == 4 else log_w.to(dtype)
        return triton.wkv6(r, decays, k, v, bonus, begin, lengths, cu_seqlens)
    log_w = log_w.to(dtype)

    def run(inputs: Sequence[Tensor], leaves: Sequence[Tensor], counts: Tensor | None) -> tuple[Tensor, tuple[Tensor]]:
        valid = None if counts is None else valid_steps(counts, inputs[0].shape[1])
        if valid is not None:
            inputs = [blank(x, valid) for x in inputs]
        reads, keys, values = (x.to(dtype) for x in inputs[:3])
        decays = log_w if len(inputs) == 3 else inputs[3]
        if form == "reference":
            y, end = reference.wkv6(reads, decays, keys, values, bonus, leaves[0], counts)
        else:
            if valid is not None and decays.dim() == 2:  # padding forgets nothing: no longer one decay for all
                decays = blank(decays.expand(*valid.shape, *decays.shape), valid)
            y, end = parallel.wkv6(reads, decays, keys, values, bonus, leaves[0])
        return (y if valid is None else blank(y, valid)).to(v.dtype), (end,)

    inputs = (r, k, v, log_w) if log_w.dim() == 4 else (r, k, v)
    if cu_seqlens is not None:
        y, (end,) = run_packed(run, inputs, (begin,), cu_seqlens)
    else:
        y, (end,) = run(inputs, (begin,), lengths)
    return y, end


def wkv6_step(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """One token: r, k ``(B, H, K)``, v ``(B, H, V)``, log_w ``(B, H, K)`` or, constant in time, ``(H, K)`` or ``(H,)``
    → y ``(B, H, V)``, new S. Otherwise as :func:`wkv6`.

    As ``"triton"`` it is one kernel; what it is asked to differentiate is differentiated in plain torch."""
    sizes = check_shapes(
        "wkv6_step",
        r=(r, "B H K"),
        k=(k, "B H K"),
        v=(v, "B H V"),
        log_w=(log_w, letters(log_w, "B H K")),
        u=(u, letters(u, "H K")),
    )
    form = choose("wkv6", backend, r.device)
    dtype = accumulation_dtype(r, log_w, k, v, u)
    begin = start_state("wkv6_step", state, (sizes["B"], sizes["H"], sizes["K"], sizes["V"]), v, dtype)
    if by_kernel(form, backend, r, log_w, k, v, u, begin):
        y, end = STEPS["wkv6"].pure(r, log_w, k, v, u, begin)
        return y, end
    decay, bonus = (_rows_of_heads(x, sizes["K"]).to(dtype) for x in (log_w, u))
    y, end = reference.step(r.to(dtype), decay, k.to(dtype), v.to(dtype), bonus, begin)
    return y.to(v.dtype), end


def letters(x: Tensor, most: str) -> str:
    """Shape of log_w or u: ``most``, or what is constant over tokens ``H K``, or over key rows too ``H``."""
    dims = x.dim() if isinstance(x, Tensor) else -1
    return {1: "H", 2: "H K"}.get(dims, most)


def _rows_of_heads(x: Tensor, rows: int) -> Tensor:
    return x[:, None].expand(-1, rows) if x.dim() == 1 else x
