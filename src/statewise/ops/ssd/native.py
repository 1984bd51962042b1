"""Binds the C++ kernel, csrc/ssd.cpp."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from statewise.ops.kernels import register_kernels

__all__ = ["ssd"]


def _groups(B: Tensor | None) -> int:
    assert B is not None
    return B.shape[1]


_ssd = register_kernels(
    "ssd",
    time=("x", "dt", "B", "C", "z"),
    shared=("A", "D"),
    state=("state",),
    output="x",
    optional=("z", "D"),
    sizes=lambda inputs, parameters, state: (*state[0].shape[1:], _groups(inputs[2])),
    kept=lambda slots, state: (slots, state[0].shape[1], state[0].shape[3], state[0].shape[2]),
    every=128,
)


def ssd(
    inputs: Sequence[Tensor | None], A: Tensor, D: Tensor | None, state: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences ``spans`` of the rows of x, dt, B, C, z ``(batch, T, ...)``, of one dtype but for dt, which is final
    and of the dtype of sums, as A, D and the state are.

    D is ``(H, P)``; z and D may be ``None``.
    """
    y, end = _ssd(*[None if x is None else x.flatten(0, 1) for x in inputs], A, D, state, spans)
    x = inputs[0]
    assert x is not None
    return y.view(x.shape), end
