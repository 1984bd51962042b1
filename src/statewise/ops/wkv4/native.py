"""Binds the C++ kernel, csrc/wkv4.cpp."""

from __future__ import annotations

from torch import Tensor

from statewise.ops.kernels import register_kernels
from statewise.state import WKV4State

__all__ = ["wkv4"]

_wkv4 = register_kernels(
    "wkv4",
    time=("k", "v"),
    shared=("log_w", "u"),
    state=("num", "den", "max"),
    output="v",
    sizes=lambda inputs, parameters, state: (state[0].shape[1],),
    kept=lambda slots, state: (slots, 3, state[0].shape[1]),
    every=32,
)


def wkv4(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State, spans: Tensor) -> tuple[Tensor, WKV4State]:
    """Sequences ``spans`` of the rows of ``(B, T, C)``; activations of one dtype, the rest of that of sums."""
    y, *end = _wkv4(k.flatten(0, 1), v.flatten(0, 1), log_w, u, *state, spans)
    return y.view(v.shape), WKV4State(*end)
