"""Binds the C++ kernel, csrc/wkv6.cpp."""

from __future__ import annotations

from torch import Tensor

from statewise.ops.kernels import register_kernels

__all__ = ["wkv6"]

_wkv6 = register_kernels(
    "wkv6",
    time=("r", "log_w", "k", "v"),
    shared=("constant", "u"),
    state=("state",),
    output="v",
    optional=("log_w", "constant"),
    sizes=lambda inputs, parameters, state: state[0].shape[1:],
    kept=lambda slots, state: (slots, *state[0].shape[1:]),
    every=16,
)


def wkv6(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, u: Tensor, state: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences ``spans`` of the rows of r, k, v ``(B, T, H, ...)``, all of one dtype.

    log_w is ``(B, T, H, K)`` of that dtype, or constant in time, ``(H, K)`` of the dtype of sums, as u is.
    """
    constant = log_w.dim() == 2
    rows = [x.flatten(0, 1) for x in (r, k, v)]
    per_token = None if constant else log_w.flatten(0, 1)
    y, end = _wkv6(rows[0], per_token, rows[1], rows[2], log_w if constant else None, u, state, spans)
    return y.view(v.shape), end
