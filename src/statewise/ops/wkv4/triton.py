"""Launches the GPU kernels, triton_kernels.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair
from statewise.state import WKV4State

__all__ = ["wkv4"]

_CHANNELS = 32  # of a program
# Tokens of a chunk, in registers, and chunks of a block, a warp each; forward has registers for more tokens, and joins
# fewer chunks then.
_FORWARD = (16, 4)
_BACKWARD = (8, 8)
_BLOCK = 64
# Where at least so many programs walk through whole sequences they fill a GPU, and every token is read once; fewer, or
# longer ones, are cut into blocks, whose tokens are read twice.
_SERIAL = 512
_BEFORE, _BEHIND = 4, 8  # numbers a channel, of a block's start and of what pulls at its end


def _block() -> int:
    """Tokens of a block. The interpreter's are short, so that few tokens are several blocks."""
    return 32 if gpu.interpreting() else _BLOCK


class _Shape:
    """How an operator's channels and tokens are divided."""

    def __init__(self, model: Tensor, where: Some, division: tuple[int, int]) -> None:
        self.tokens, self.chunks = (2, 16) if gpu.interpreting() else division
        self.channels = 8 if gpu.interpreting() else _CHANNELS
        self.at = gpu.place(model, where, _block())
        self.C = model.shape[-1]
        self.across = -(-self.C // self.channels)
        self.serial = self.at.slots <= self.at.rows or self.at.rows * self.across >= _SERIAL

    def launch(self, kernel: Any, *tensors: Any, programs: int, **constants: Any) -> None:
        """A kernel of blocks."""
        sizes = {"C": self.C, "U": self.tokens, "N": self.chunks, "CB": self.channels, "RAGGED": self.at.ragged}
        grid = (programs, self.across)
        gpu.launch(kernel, grid, *tensors, *self.at.arguments, warps=self.chunks, **sizes, **constants)

    def launch_join(self, kernel: Any, *tensors: Any) -> None:
        """A kernel that goes through all blocks of a sequence, which are numbers by now."""
        sizes = {"C": self.C, "L": _block(), "CB": self.channels, "RAGGED": self.at.ragged, "P": 4}
        gpu.launch(kernel, (self.at.rows, self.across), *tensors, *self.at.arguments[:3], warps=1, **sizes)


class _Kernels:
    """k and v; log_w and u; num, den and max. Kept: the sum before every block."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        batch, time, C = call.inputs[0].shape
        return (gpu.slot_count(batch, time, call.where[1], _block()), _BEFORE, C)

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.wkv4 import triton_kernels as kernels

        (k, v), (log_w, u), leaves, where, _ = call
        shape = _Shape(k, where, _FORWARD)
        y, ends = gpu.new(v, where), [torch.empty_like(leaf) for leaf in leaves]
        starts = leaves[0].new_empty((shape.at.slots, _BEFORE, shape.C) if keep or not shape.serial else 0)
        programs = shape.at.rows
        if not shape.serial:
            programs = shape.at.slots
            shape.launch(kernels.sums, k, v, log_w, starts, programs=programs)
            shape.launch_join(kernels.join, log_w, *leaves, starts, *ends)
        given = (k, v, log_w, u, *leaves, starts, y, *ends)
        shape.launch(kernels.forward, *given, programs=programs, SERIAL=shape.serial, KEEP=keep)
        return y, ends, starts if keep else leaves[0].new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.wkv4 import triton_kernels as kernels

        (k, v), (log_w, u), leaves, where, _ = call
        shape = _Shape(k, where, _BACKWARD)
        d_k, d_v = gpu.new(k, where), gpu.new(v, where)
        d_first = [torch.empty_like(leaf) for leaf in leaves]
        programs = shape.at.rows if shape.serial else shape.at.slots
        # Beyond one row a program, log_w has one a sequence, of what its first state fades.
        d_log_w = log_w.new_empty(programs + (0 if shape.serial else shape.at.rows), shape.C)
        d_u = u.new_empty(programs, shape.C)
        behind = leaves[0].new_empty(0 if shape.serial else (shape.at.slots, _BEHIND, shape.C))
        if not shape.serial:
            shape.launch(kernels.pulls, k, v, log_w, u, *leaves, kept, behind, grad_y, programs=programs)
            shape.launch_join(
                kernels.join_back, log_w, *leaves, behind, *ends, *grad_ends, d_log_w[programs:], *d_first
            )
        given = (k, v, log_w, u, *leaves, kept, behind, *ends, grad_y, *grad_ends, d_k, d_v, d_log_w, d_u, *d_first)
        shape.launch(kernels.backward, *given, programs=programs, SERIAL=shape.serial)
        return [d_k, d_v], [d_log_w.sum(0), d_u.sum(0)], d_first


_wkv4 = register_pair(
    "wkv4_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("k", "v"),
    shared=("log_w", "u"),
    state=("num", "den", "max"),
    output="v",
    where=gpu.WHERE,
)


def wkv4(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    state: WKV4State,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, WKV4State]:
    """k and v ``(B, T, C)`` of any dtype; parameters and state have the dtype of sums."""
    y, *end = _wkv4(k, v, log_w, u, *state, lengths, cu_seqlens)
    return y, WKV4State(*end)
