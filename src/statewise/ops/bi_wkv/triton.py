"""Launches the GPU kernels, triton_kernels.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["bi_wkv"]

# Tokens of a chunk, in registers; chunks of a block; channels of a program.
_BLOCKS = (8, 8, 32)
_WHOLE = (16, 16, 16)  # forward takes sequences up to 256 tokens in one launch
# The interpreter's are shorter, so that few tokens are several blocks.
_SMALL_BLOCKS = (2, 16, 16)
_SMALL_WHOLE = (2, 32, 16)
_EDGES, _PULLS = 8, 12  # numbers a channel: of both sides of a block, and of what pulls from there


class _Shape:
    """How an operator's channels and tokens are divided; ``longer`` if sequences that fit are taken whole at a length
    that backward has no registers for."""

    def __init__(self, model: Tensor, where: Some, longer: bool) -> None:
        blocks, whole = (_SMALL_BLOCKS, _SMALL_WHOLE) if gpu.interpreting() else (_BLOCKS, _WHOLE)
        self.rows, time, self.C = model.shape
        fits = longer and blocks[0] * blocks[1] < time <= whole[0] * whole[1]
        self.tokens, self.chunks, self.channels = whole if fits else blocks
        self.whole = time <= self.tokens * self.chunks
        self.slots = self.rows * -(-time // (self.tokens * self.chunks))
        self.across = -(-self.C // self.channels)
        self.where = (time, where[0])
        self.constants = {"C": self.C, "CB": self.channels, "RAGGED": int(where[0] is not None)}

    @property
    def edges(self) -> int:
        """Rows of numbers a channel that say what stands on both sides of each block."""
        return 0 if self.whole else self.slots * _EDGES

    def launch(self, kernel: Any, *tensors: Any, **constants: Any) -> None:
        """A kernel of blocks."""
        sizes = {**self.constants, "U": self.tokens, "N": self.chunks, **constants}
        warps = max(1, self.chunks * self.channels // 32)
        gpu.launch(kernel, (self.slots, self.across), *tensors, *self.where, warps=warps, **sizes)

    def launch_join(self, kernel: Any, *tensors: Any) -> None:
        """A kernel that goes through all blocks of a sequence, which are numbers by now, from either side."""
        sizes = {**self.constants, "L": self.tokens * self.chunks, "P": 4}
        gpu.launch(kernel, (self.rows, self.across, 2), *tensors, *self.where, warps=1, **sizes)


class _Kernels:
    """k and v; log_w and u; no state. Kept: what stands around each block, if there are several, then the first
    average of each row."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        shape = _Shape(call.inputs[0], call.where, True)
        return (shape.edges + shape.rows, shape.C)

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.bi_wkv import triton_kernels as kernels

        (k, v), (log_w, u), _, where, _ = call
        shape = _Shape(k, where, True)
        # Blocks and rows without tokens write nothing.
        make = log_w.new_empty if where[0] is None else log_w.new_zeros
        y, kept = gpu.new(v, where), make((shape.edges + shape.rows, shape.C))
        if not shape.whole:
            shape.launch(kernels.sums, k, v, log_w, kept)
            shape.launch_join(kernels.join, log_w, kept)
        given = (k, v, log_w, u, kept, kept[shape.edges :], y)
        shape.launch(kernels.forward, *given, WHOLE=shape.whole, KEEP=keep)
        return y, [], kept if keep else log_w.new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.bi_wkv import triton_kernels as kernels

        (k, v), (log_w, u), _, where, _ = call
        shape = _Shape(k, where, False)
        d_k, d_v = gpu.new(k, where), gpu.new(v, where)
        d_log_w, d_u = log_w.new_empty(shape.slots, shape.C), u.new_empty(shape.slots, shape.C)
        behind = log_w.new_empty(0 if shape.whole else (shape.slots, _PULLS, shape.C))
        edges, first_y = kept, kept[-shape.rows :]
        if not shape.whole and kept.shape[0] == shape.rows:  # forward took the sequences whole
            edges = log_w.new_empty(shape.edges, shape.C)
            shape.launch(kernels.sums, k, v, log_w, edges)
            shape.launch_join(kernels.join, log_w, edges)
        given = (k, v, log_w, u, edges, first_y, behind, grad_y)
        if not shape.whole:
            shape.launch(kernels.pulls, *given)
            shape.launch_join(kernels.join_pulls, log_w, behind)
        shape.launch(kernels.backward, *given, d_k, d_v, d_log_w, d_u, WHOLE=shape.whole)
        return [d_k, d_v], [d_log_w.sum(0), d_u.sum(0)], []


_bi_wkv = register_pair(
    "bi_wkv_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("k", "v"),
    shared=("log_w", "u"),
    state=(),
    output="v",
    where=gpu.WHERE[:1],
)


def bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, lengths: Tensor | None) -> Tensor:
    """k and v ``(B, T, C)`` of any dtype; parameters have the dtype of sums."""
    return _bi_wkv(k, v, log_w, u, lengths)[0]
