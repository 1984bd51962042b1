"""Binds the C++ kernel, csrc/causal_conv1d.cpp."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from statewise.ops.kernels import register_kernels

__all__ = ["MOST_TAPS", "causal_conv1d"]

#: The kernel is compiled for every W up to this one.
MOST_TAPS = 8


def _register(name: str, silu: bool) -> Callable[..., tuple[Tensor, ...]]:
    return register_kernels(
        name,
        time=("x",),
        shared=("weight", "bias"),
        state=("window",),
        output="x",
        optional=("bias",),
        sizes=lambda inputs, parameters, state: (state[0].shape[2], state[0].shape[1] + 1, int(silu)),
        function="causal_conv1d",
    )


_plain = _register("causal_conv1d", False)
_silu = _register("causal_conv1d_silu", True)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, window: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences ``spans`` of the rows of x ``(B, T, C)``; weight, bias and window have the dtype of sums."""
    form = _plain if activation is None else _silu
    y, end = form(x.flatten(0, 1), weight, bias, window, spans)
    return y.view(x.shape), end
