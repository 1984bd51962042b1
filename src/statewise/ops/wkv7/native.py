"""Binds the C++ kernel, csrc/wkv7.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from statewise.ops.kernels import register_kernels

__all__ = ["wkv7"]

_EVERY = 16

_wkv7 = register_kernels(
    "wkv7",
    time=("r", "log_w", "k", "v", "a", "b"),
    shared=(),
    state=("state",),
    output="v",
    sizes=lambda inputs, parameters, state: state[0].shape[1:],
    # Behind the state before a chunk (K, V) lies what each of its tokens found (16, V).
    kept=lambda slots, state: (slots, state[0].shape[1], state[0].shape[2] + _EVERY, state[0].shape[3]),
    every=_EVERY,
)


def wkv7(inputs: Sequence[Tensor], state: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
    """Sequences ``spans`` of the rows of r, log_w, k, v, a, b ``(B, T, H, ...)``, all of one dtype."""
    y, end = _wkv7(*[x.flatten(0, 1) for x in inputs], state, spans)
    return y.view(inputs[3].shape), end
