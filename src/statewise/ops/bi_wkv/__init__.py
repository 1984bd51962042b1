"""Bi-WKV: Vision-RWKV's average of values, weighted by ``exp(key)`` and by distance, on both sides of each token.

Legend: B batch, T time, C channels.

    y_t = (Σ_{i≠t} e^{(|t-i|-1)·log_w + k_i} v_i + e^{u+k_t} v_t) / (Σ_{i≠t} e^{(|t-i|-1)·log_w + k_i} + e^{u+k_t})

Source: Duan et al. 2024, "Vision-RWKV: Efficient and Scalable Visual Perception with RWKV-Like Architectures", eq. 5.
In that model ``log_w = -spatial_decay / T`` and ``u = spatial_first / T``. The published CUDA kernels compute another
sum (README.md here says which); this is the equation.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from statewise.ops.bi_wkv import native, parallel, reference, triton
from statewise.ops.checks import accumulation_dtype, activation_dtype, check_shapes
from statewise.ops.dispatch import choose
from statewise.ops.kernels import spans
from statewise.ops.ragged import blank, check_ragged, valid_steps

__all__ = ["bi_wkv", "bi_wkv_step"]

_NO_STATE = "it is not causal: every output needs the whole sequence, so there is no state to carry from token to token"


def bi_wkv(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: None = None,
    *,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The average of a whole sequence, seen from each of its tokens.

    Args:
        k: keys ``(B, T, C)``; any finite size, since only differences of exponents are ever exponentiated.
        v: values ``(B, T, C)``.
        log_w: log of the weight's factor per step of distance ``(C,)``; any sign: weights grow with distance above 0.
        u: bonus of the present token, in log space ``(C,)``.
        state: must be ``None``; it stands here to be refused with the reason.
        lengths: ``(B,)`` int64, right-padded rows: see the contract's section 3. ``None`` means all rows are full.
        backend: ``None`` (fastest), ``"reference"`` (work grows with T²), ``"torch"``, ``"native"`` or ``"triton"``
            (with T).

    Returns:
        y ``(B, T, C)`` of v's dtype, alone: sums are float32 (float64 if any input is float64).

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, a backend that cannot serve, or a state.
    """
    if state is not None:
        raise ValueError(f"bi_wkv: state was given; accepted is None: {_NO_STATE}")
    sizes = check_shapes("bi_wkv", k=(k, "B T C"), v=(v, "B T C"), log_w=(log_w, "C"), u=(u, "C"))
    check_ragged("bi_wkv", lengths, None, sizes["B"], sizes["T"], k.device)
    form = choose("bi_wkv", backend, k.device)
    dtype = accumulation_dtype(k, v, log_w, u)
    if sizes["T"] == 0:
        return torch.zeros_like(v)
    if form == "native":
        carried = activation_dtype(dtype, k, v)
        where = spans(sizes["B"], sizes["T"], lengths, None)
        return native.bi_wkv(k.to(carried), v.to(carried), log_w.to(dtype), u.to(dtype), where).to(v.dtype)
    if form == "triton":
        return triton.bi_wkv(k, v, log_w.to(dtype), u.to(dtype), lengths)
    keys, values = k.to(dtype), v.to(dtype)
    valid = None if lengths is None else valid_steps(lengths, sizes["T"])
    if valid is not None:
        keys, values = blank(keys, valid, parallel.nothing(dtype)), blank(values, valid)
    serve = reference.bi_wkv if form == "reference" else parallel.bi_wkv
    y = serve(keys, values, log_w.to(dtype), u.to(dtype))
    return (y if valid is None else blank(y, valid)).to(v.dtype)


def bi_wkv_step(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: None = None, *, backend: str | None = None
) -> NoReturn:
    """There is no such form; the name exists so that asking for it is answered.

    Raises:
        ValueError: always, with the reason.
    """
    raise ValueError(f"bi_wkv_step: bi_wkv has no one-token form; {_NO_STATE}")
