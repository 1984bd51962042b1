"""Launches the GPU kernels, triton_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["MOST_STATES", "ssd"]

MOST_STATES = 256

# Programs that fill a GPU. Fewer sequences and heads than these are cut into segments of time, and gradients of B and C
# into blocks of heads. A constant, not what the device has: the order of sums is the same on all of them.
_PROGRAMS = 256
# Of warps and stages; neither changes a sum.
_CHOICES = ((8, 2), (8, 1), (4, 2), (4, 1))
_FEW = ((8, 2), (4, 2), (4, 1))  # for `weigh`, which holds no state


def _tile(size: int) -> int:
    """Columns of a tile: a power of two, and as many as a matrix product takes at least."""
    return max(16, 1 << (size - 1).bit_length())


def _precision(inputs: Some, precise: bool, sums: torch.dtype) -> str:
    if sums == torch.float64:
        return gpu.dot_precision(sums)
    x, _, B, C, _ = inputs
    wide = any(value.dtype == torch.float32 for value in (x, B, C))
    return gpu.dot_precision(torch.float32 if wide else x.dtype, precise)


class _Plan:
    """What the launches of one call have in common."""

    def __init__(self, call: Call) -> None:
        from statewise.ops.ssd import triton_kernels

        self.kernels: Any = triton_kernels
        (x, dt, B, C, z), (A, D), (state,), where, options = call
        self.x, self.dt, self.B, self.C, self.z, self.A, self.D, self.begin = x, dt, B, C, z, A, D, state
        self.H, self.P, self.N = state.shape[1:]
        self.groups, self.tokens = B.shape[2], x.shape[0] * x.shape[1]
        precision = _precision(call.inputs, options[0], state.dtype)
        half = precision.startswith("bf16")
        # Of what is only ever multiplied, and of the states stored for that, which have a power of two to each.
        self.factor = torch.bfloat16 if half else state.dtype
        self.stored = torch.float16 if half else state.dtype
        self.chunk = 64 if half else 32
        # What lets every program have all of its numbers in registers, on all GPUs.
        width, wide = min(_tile(self.P), 64 if half else 16), _tile(self.N)
        self.blocks = -(-self.P // width)
        walked, gathered = min(wide, 32), min(wide, 64 if half else 32)
        self.slices, self.tiles = wide // walked, wide // gathered
        self.walking = {"NB": walked, "SLICES": self.slices}
        self.gathering = {"NB": gathered, "SLICES": self.tiles}
        self.sizes = {"H": self.H, "E": self.H // self.groups, "P": self.P, "N": self.N, "L": self.chunk, "PB": width}
        self.sizes["PRECISION"] = precision
        self.key = f"ssd {precision} H{self.H} P{self.P} N{self.N} G{self.groups} z{z is not None}"
        self.chunks = gpu.place(x, where, self.chunk)
        self.segment = self._segment(x.shape[1])
        self.segments = gpu.place(x, where, self.segment)

        self.sums = state.new_empty(self.chunks.slots, self.H, 3, self.chunk)
        heads = min(_tile(self.H), 32)
        grid = (self.chunks.slots, -(-self.H // heads))
        constants = {"H": self.H, "L": self.chunk, "HB": heads, "RAGGED": self.chunks.ragged}
        gpu.launch(self.kernels.add_up, grid, dt, A, self.sums, *self.chunks.arguments, **constants)

    def _segment(self, time: int) -> int:
        """Tokens that a program walks one after another."""
        least = 2 * self.chunk
        return gpu.segment(time, int(self.tokens * self.H // _PROGRAMS), least, least)

    def launch(self, kernel: Any, name: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        def run(choice: tuple[int, int]) -> None:
            warps, stages = choice
            gpu.launch(kernel, grid, *arguments, warps=warps, stages=stages, **self.sizes, **constants)

        run(gpu.tune(f"{self.key} {name}", self.begin.device, _FEW if name == "weigh" else _CHOICES, run))

    def walk(self, kernel: Any, name: str, *arguments: Any, **constants: Any) -> None:
        """One program a segment, head and tile of P; of N, too, in `carry`."""
        at = self.segments
        grid = (at.slots, self.H, self.blocks * (self.slices if kernel is self.kernels.carry else 1))
        constants = constants | self.walking
        self.launch(kernel, name, grid, *arguments, self.segment, *at.arguments, RAGGED=at.ragged, **constants)

    def starts(
        self, begin: Tensor, rows: Tensor, z: Tensor | None, columns: Tensor, *, reverse: bool, fine: bool = True
    ) -> Tensor:
        """The states before all segments, or the cotangents after them (``reverse``); ``fine`` for backward."""
        if self.segment == gpu.WHOLE:
            return begin
        at, size = self.segments, self.P * self.N
        states, decay = begin.new_empty(at.slots, *begin.shape[1:]), begin.new_empty(at.slots, self.H)
        given, ways = (rows, z, columns, self.sums, states, decay), {"REVERSE": reverse, "FINE": fine}
        self.walk(self.kernels.carry, f"carry {reverse} {fine}", *given, **ways)
        block = min(1024, _tile(size))
        grid = (at.rows, self.H, -(-size // block))
        constants = {"H": self.H, "REVERSE": reverse, "BLOCK": block, "RAGGED": at.ragged}
        gpu.launch(self.kernels.pass_on, grid, begin, states, decay, self.segment, *at.arguments, size, **constants)
        return states


class _Kernels:
    """x, dt, B, C, z; A and D; the state. Options: whether products of half inputs are precise."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        return (0,)

    def forward(self, call: Call, keep: bool) -> Results:
        one, where = _Plan(call), call.where
        y, end = gpu.new(one.x, where), torch.empty_like(one.begin)
        start = one.starts(one.begin, one.x, None, one.B, reverse=False, fine=False)
        given = (one.x, one.B, one.C, one.D, one.z, one.sums, start, y, end)
        one.walk(one.kernels.emit, "emit", *given, *[None] * 7, one.chunks.slots)
        return y, [end], one.begin.new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        one, where = _Plan(call), call.where
        x, B, C, D, z, begin, slots = one.x, one.B, one.C, one.D, one.z, one.begin, one.chunks.slots
        states, cotangents = (begin.new_empty(slots, *begin.shape[1:], dtype=one.stored) for _ in range(2))
        units = begin.new_empty(one.blocks, 2, slots, one.H)
        parts = begin.new_empty(one.blocks, 2, slots, one.H, one.chunk)
        d_z = None if z is None else gpu.new(z, where)
        d_D = None if D is None else begin.new_zeros(slots, *D.shape)
        gated = None if z is None else x.new_empty(x.shape, dtype=one.factor)
        start = one.starts(begin, x, None, B, reverse=False)
        given = (x, B, C, D, z, one.sums, start, None, None, grad_y, gated, d_z, d_D, states, units, parts, slots)
        one.walk(one.kernels.emit, "states", *given)

        d_x, d_begin = gpu.new(x, where), torch.empty_like(begin)
        start = one.starts(grad_ends[0], grad_y, z, C, reverse=True)
        back = (x, grad_y, z, B, C, D, one.sums, start, cotangents, units, d_begin, d_x, parts, slots)
        one.walk(one.kernels.mirror, "mirror", *back)

        each = one.H // one.groups
        blocks = min(each, -(-4 * _PROGRAMS // max(1, slots * one.groups * one.tiles)))
        heads = -(-each // blocks)
        blocks = -(-each // heads)
        # Summed in the dtype of sums; of one block there is nothing to sum.
        d_B, d_C = (gpu.new(begin if blocks > 1 else value, where, (blocks, *B.shape)) for value in (B, C))
        through = begin.new_empty(one.tiles, slots, one.H)
        shared = (x, grad_y if gated is None else gated, B, C, one.sums, states, cotangents, units, through, d_B, d_C)
        numbers = (slots, one.tokens, heads, blocks)
        grid, at = (slots, one.groups * blocks * one.tiles), one.chunks
        constants = {"RAGGED": at.ragged, **one.gathering}
        one.launch(one.kernels.gather, "gather", grid, *shared, *numbers, *at.arguments, **constants)
        d_dt, d_A = gpu.new(one.dt, where), begin.new_zeros(slots, one.H)
        of_dt = (x, grad_y, z, one.A, B, C, one.sums, through, parts, d_dt, d_A, slots)
        one.launch(one.kernels.weigh, "weigh", (slots, one.H), *of_dt, *at.arguments, **constants)
        d_B, d_C = ((d[0] if blocks == 1 else d.sum(0)).to(value.dtype) for d, value in ((d_B, B), (d_C, C)))
        return [d_x, d_dt, d_B, d_C, d_z], [d_A.sum(0), None if d_D is None else d_D.sum(0)], [d_begin]


_ssd = register_pair(
    "ssd_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("x", "dt", "B", "C", "z"),
    shared=("A", "D"),
    state=("state",),
    output="x",
    where=gpu.WHERE,
    options=("bool precise",),
    optional=("z", "D"),
)


def ssd(
    inputs: Sequence[Tensor | None],
    A: Tensor,
    D: Tensor | None,
    state: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x, dt, B, C and z ``(batch, T, ...)``: of any dtype but for dt, which is final and of the dtype of sums, as A,
    D ``(H, P)`` and the state are. z and D may be ``None``."""
    y, end = _ssd(*inputs, A, D, state, lengths, cu_seqlens, gpu.asked_precise())
    return y, end
