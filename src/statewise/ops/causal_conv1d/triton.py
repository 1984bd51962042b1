"""Launches the GPU kernels, triton_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["causal_conv1d"]

_CHUNK = 64
# (channels of a program, warps, tokens loaded at once): none changes a sum.
_CHOICES = {
    "forward": ((256, 4, 8), (512, 4, 8), (128, 4, 8)),
    "backward": ((256, 4, 2), (256, 4, 4), (512, 4, 2)),
}


class _Kernels:
    """x; weight and bias; the window. Options: whether through SiLU."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        return (0,)

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.causal_conv1d import triton_kernels as kernels

        (x,), (weight, bias), (window,), where, options = call
        y, end = gpu.new(x, where), torch.empty_like(window)
        self._run(kernels.forward, (x, weight, bias, window, y, end), where, options)
        return y, [end], window.new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.causal_conv1d import triton_kernels as kernels

        (x,), (weight, bias), (window,), where, options = call
        slots = gpu.place(x, where, _CHUNK).slots
        d_x, d_window = gpu.new(x, where), torch.empty_like(window)
        d_weight = weight.new_empty(slots, *weight.shape)
        d_bias = None if bias is None else bias.new_empty(slots, *bias.shape)
        given = (x, weight, bias, window, grad_y, grad_ends[0], d_x, d_weight, d_bias, d_window)
        self._run(kernels.backward, given, where, options)
        return [d_x], [d_weight.sum(0), None if d_bias is None else d_bias.sum(0)], [d_window]

    def _run(self, kernel: Any, tensors: Sequence[Tensor | None], where: Some, options: Some) -> None:
        x, weight, bias = tensors[:3]
        assert x is not None
        assert weight is not None
        C, W = weight.shape
        at = gpu.place(x, where, _CHUNK)

        def run(choice: tuple[int, int, int]) -> None:
            block, warps, group = choice
            grid = (at.slots, -(-C // block))
            constants = {"W": W, "SILU": options[0], "HAS_BIAS": bias is not None, "RAGGED": at.ragged}
            sizes = {"L": _CHUNK, "S": group, "CB": block}
            gpu.launch(kernel, grid, *tensors, *at.arguments, C, warps=warps, **constants, **sizes)

        key = f"causal_conv1d {kernel.__name__} {x.dtype} W{W} C{min(C, 256)}"
        run(gpu.tune(key, x.device, _CHOICES[kernel.__name__], run))


_causal_conv1d = register_pair(
    "causal_conv1d_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("x",),
    shared=("weight", "bias"),
    state=("window",),
    output="x",
    where=gpu.WHERE,
    options=("bool silu",),
    optional=("bias",),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    window: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x ``(B, T, C)`` of any dtype; weight, bias and window have the dtype of sums."""
    y, end = _causal_conv1d(x, weight, bias, window, lengths, cu_seqlens, activation is not None)
    return y, end
