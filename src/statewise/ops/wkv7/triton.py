"""Launches the GPU kernels, triton_kernels.py.

Legend: B batch, T time, H heads, K key rows, V value columns, KP and VP the two padded to powers of two, L tokens of a
chunk, S tokens of a segment, n sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["MOST", "wkv7"]

#: Key rows and value columns of a head that fit on chip.
MOST = 128

_CHUNK = 32
# Programs that keep a GPU busy: rows and heads fewer than these are cut into segments, of so many tokens at least.
# Constants, not what the device has: the order of sums is the same on all of them.
_PROGRAMS = 128
_SEGMENT = 256
# Key rows at a time where not all are needed at once.
_BAND = 32


class _Plan(NamedTuple):
    """How a call is computed. A chunk is what fits on chip; it never depends on T or B."""

    H: int
    K: int
    V: int
    KP: int
    VP: int
    L: int
    middle: torch.dtype  # of what goes between kernels
    precision: str
    fine: str  # precision of what is inside a chunk

    @property
    def sizes(self) -> dict[str, Any]:
        return {"L": self.L, "KP": self.KP, "VP": self.VP, "PRECISION": self.precision}


def _plan(call: Call) -> _Plan:
    (r, _, k, v, a, b), _, (state,), _, options = call
    H, K, V = state.shape[1:]
    KP, VP = (max(16, 1 << (n - 1).bit_length()) for n in (K, V))
    half = all(x.dtype in (torch.bfloat16, torch.float16) for x in (r, k, v, a, b))
    dtype = torch.bfloat16 if half and state.dtype != torch.float64 else state.dtype
    precision = gpu.dot_precision(dtype, options[0])
    coarse = precision.startswith("bf16")
    # Inside a chunk, what equal keys add to a value and what they take away nearly cancel: eight bits would show.
    fine = gpu.dot_precision(dtype, True) if coarse else precision
    return _Plan(H, K, V, KP, VP, _CHUNK, torch.bfloat16 if coarse else state.dtype, precision, fine)


def _shapes(plan: _Plan, slots: int) -> list[tuple[tuple[int, ...], bool]]:
    """What is kept, and whether in the dtype of what goes between kernels: read, move, states, inverse, decay."""
    L, KP, VP, each = plan.L, plan.KP, plan.VP, (slots, plan.H)
    tiles = ((L, KP), (KP, KP), (KP, VP), (L, L))
    return [*(((*each, *tile), True) for tile in tiles), ((*each, KP), False)]


def _count(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _room(plan: _Plan, slots: int, wide: torch.dtype) -> int:
    """Elements of what is kept, which is flat and of the dtype of sums."""
    shapes = _shapes(plan, slots)
    return sum(_count(s) * (plan.middle if narrow else wide).itemsize for s, narrow in shapes) // wide.itemsize


def _views(plan: _Plan, slots: int, kept: Tensor) -> list[Tensor]:
    """The parts of what is kept."""
    parts, start = [], 0
    for shape, narrow in _shapes(plan, slots):
        dtype = plan.middle if narrow else kept.dtype
        size = _count(shape) * dtype.itemsize // kept.dtype.itemsize
        parts.append(kept[start : start + size].view(dtype).view(shape))
        start += size
    return parts


class _Kernels:
    """r, log_w, k, v, a, b; the state. Options: whether half inputs are multiplied in TF32."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        plan = _plan(call)
        batch, time = call.inputs[3].shape[:2]
        slots = gpu.slot_count(batch, time, call.where[1], plan.L)
        return (_room(plan, slots, call.leaves[0].dtype),)

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.wkv7 import triton_kernels as kernels

        inputs, _, (state,), where, _ = call
        plan, v = _plan(call), inputs[3]
        at = gpu.place(v, where, plan.L)
        kept = state.new_empty(_room(plan, at.slots, state.dtype))
        read, move, states, inverse, decay = _views(plan, at.slots, kept)
        add_y = state.new_empty(at.slots, plan.H, plan.L, plan.VP, dtype=plan.middle)
        add = torch.empty_like(states)
        y, end = gpu.new(v, where), torch.empty_like(state)
        grid = (at.slots, plan.H)
        gpu.launch(
            kernels.chunk,
            grid,
            *(*inputs, read, add_y, move, add, decay, inverse if keep else None),
            *(*at.arguments, plan.H, plan.K, plan.V),
            **plan.sizes,
            RAGGED=at.ragged,
            KEEP=keep,
            CB=min(_BAND, plan.KP),
            FINE=plan.fine,
        )
        self._scan(plan, call, (move, add, decay), state, states, end, False)
        given = (read, add_y, states, y, *at.arguments, plan.H, plan.V)
        gpu.launch(kernels.emit, grid, *given, **plan.sizes, RAGGED=at.ragged)
        return y, [end], kept if keep else state.new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.wkv7 import triton_kernels as kernels

        inputs, _, (state,), where, _ = call
        plan, v = _plan(call), inputs[3]
        at = gpu.place(v, where, plan.L)
        read, move, states, inverse, decay = _views(plan, at.slots, kept)
        add, grad_states, d_state = torch.empty_like(states), torch.empty_like(states), torch.empty_like(state)
        grads = [gpu.new(x, where) for x in inputs]
        grid = (at.slots, plan.H)
        given = (read, grad_y, add, *at.arguments, plan.H, plan.V)
        gpu.launch(kernels.pull, grid, *given, **plan.sizes, RAGGED=at.ragged)
        self._scan(plan, call, (move, add, decay), grad_ends[0], grad_states, d_state, True)
        gpu.launch(
            kernels.backward,
            grid,
            *(*inputs, grad_y, states, grad_states, inverse, decay, *grads),
            *(*at.arguments, plan.H, plan.K, plan.V),
            **plan.sizes,
            RAGGED=at.ragged,
            CB=min(_BAND, plan.KP),
            FINE=plan.fine,
            warps=8,
        )
        return grads, [], [d_state]

    def _scan(
        self,
        plan: _Plan,
        call: Call,
        maps: Sequence[Tensor],
        begin: Tensor,
        states: Tensor,
        end: Tensor,
        reverse: bool,
    ) -> None:
        """The states before all chunks, or the cotangents after them, and the last; ``maps``: move, add and decay."""
        from statewise.ops.wkv7 import triton_kernels as kernels

        v = call.inputs[3]
        batch, time = v.shape[:2]
        segment = gpu.segment(time, batch * time * plan.H // _PROGRAMS, _SEGMENT, plan.L)
        at = gpu.place(v, call.where, segment)
        columns = min(plan.VP, 64)
        tiles: dict[str, Any] = {**plan.sizes, "VB": columns, "RAGGED": at.ragged, "REVERSE": reverse}
        if segment != gpu.WHOLE:
            begin = self._starts(plan, at, segment, maps, begin, tiles)
        given = (*maps, begin, states, end, segment, *at.arguments, plan.H, plan.K, plan.V)
        gpu.launch(kernels.scan, (at.slots, plan.H, plan.VP // columns), *given, **tiles)

    def _starts(
        self, plan: _Plan, at: gpu.Where, segment: int, maps: Sequence[Tensor], begin: Tensor, tiles: dict[str, Any]
    ) -> Tensor:
        """What every segment begins with."""
        from statewise.ops.wkv7 import triton_kernels as kernels

        both = plan.KP + plan.VP
        whole, starts = begin.new_empty(at.slots, plan.H, plan.KP, both), begin.new_empty(at.slots, *begin.shape[1:])
        columns = min(plan.KP, tiles["VB"])
        given = (*maps, whole, segment, *at.arguments, plan.H)
        gpu.launch(kernels.carry, (at.slots, plan.H, both // columns), *given, **{**tiles, "VB": columns})
        time, lengths, cu_seqlens, _ = at.arguments
        onward = (whole, begin, starts, segment, time, lengths, cu_seqlens, plan.H, plan.K, plan.V)
        grid = (at.rows * plan.H, plan.VP // tiles["VB"])
        gpu.launch(kernels.pass_on, grid, *onward, **{**tiles, "PRECISION": plan.fine})
        return starts


_wkv7 = register_pair(
    "wkv7_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("r", "log_w", "k", "v", "a", "b"),
    shared=(),
    state=("state",),
    output="v",
    where=gpu.WHERE,
    options=("bool precise",),
)


def wkv7(
    inputs: Sequence[Tensor], state: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of r, log_w, k, v, a, b ``(B, T, H, ·)`` of any dtype, T ≥ 1; the state has the dtype of sums."""
    y, end = _wkv7(*inputs, state, lengths, cu_seqlens, gpu.asked_precise())
    return y, end
