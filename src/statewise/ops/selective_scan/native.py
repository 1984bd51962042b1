"""Binds the C++ kernel, csrc/selective_scan.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from statewise.ops.kernels import register_kernels

__all__ = ["selective_scan"]


def _groups(B: Tensor | None) -> int:
    assert B is not None
    return B.shape[1]


def _register(name: str, softplus: bool) -> Callable[..., tuple[Tensor, ...]]:
    return register_kernels(
        name,
        time=("x", "dt", "B", "C", "z"),
        shared=("A", "D", "dt_bias"),
        state=("state",),
        output="x",
        optional=("z", "D", "dt_bias"),
        sizes=lambda inputs, parameters, state: (
            *state[0].shape[1:],
            _groups(inputs[2]),
            int(softplus),
            int(inputs[1] is not None and inputs[1].dtype == state[0].dtype),
        ),
        kept=lambda slots, state: (slots, state[0].shape[2], state[0].shape[1]),
        every=16,
        function="selective_scan",
    )


_plain = _register("selective_scan", False)
_softplus = _register("selective_scan_softplus", True)


def selective_scan(
    inputs: Sequence[Tensor | None], parameters: Sequence[Tensor | None], softplus: bool, state: Tensor, spans: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequences ``spans`` of the rows of x, dt, B, C, z ``(batch, T, ...)``; B and C have groups.

    They are of one dtype, but dt may be of that of sums, for a step size that half precision would round too far. A, D
    and dt_bias have the dtype of sums; z, D and dt_bias may be ``None``.
    """
    form = _softplus if softplus else _plain
    y, end = form(*[None if x is None else x.flatten(0, 1) for x in inputs], *parameters, state, spans)
    x = inputs[0]
    assert x is not None
    return y.view(x.shape), end
