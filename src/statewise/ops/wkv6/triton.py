"""Launches the GPU kernels, triton_kernels.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["wkv6"]

_CHUNK = 64  # tokens between states in memory
_STEP = 16
# Key rows and value columns of a program, at most.
_TILE, _TILE_WIDE = 64, 32
_ELEMENTS = 1024  # of a program of the scan
# By registers, and not chosen by the clock: the order of sums within a program depends on them.
_WARPS = {"summaries": 4, "emit": 4, "backward": 8}


class _Kernels:
    """r, log_w, k, v; the constant decay and u; S. Of the two decays one is absent. Options: whether precisely."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        r = call.inputs[0]
        return (gpu.slot_count(r.shape[0], r.shape[1], call.where[1], _CHUNK), *call.leaves[0].shape[1:])

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.wkv6 import triton_kernels as kernels

        (r, log_w, k, v), (constant, u), (begin,), where, _ = call
        plan = _Plan(call)
        decay = constant if log_w is None else log_w
        starts, end = plan.states(kernels, (k, v, decay), begin, reverse=False)
        y = plan.partial(v, where, plan.tiles_k)
        plan.run(kernels.emit, plan.steps, (r, decay, k, v, u, starts, y))
        return _whole(y, v), [end], starts if keep else begin.new_empty(0)

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.wkv6 import triton_kernels as kernels

        (r, log_w, k, v), (constant, u), (begin,), where, _ = call
        plan = _Plan(call)
        decay = constant if log_w is None else log_w
        pulls, d_begin = plan.states(kernels, (r, grad_y, decay), grad_ends[0], reverse=True)
        d_r, d_k = (plan.partial(x, where, plan.tiles_v) for x in (r, k))
        d_v = plan.partial(v, where, plan.tiles_k)
        d_u = begin.new_empty(plan.steps, plan.tiles_v, *u.shape)
        d_decay = torch.empty_like(d_u) if log_w is None else plan.partial(log_w, where, plan.tiles_v)
        given = (r, decay, k, v, u, kept, pulls, grad_y, d_r, d_decay, d_k, d_v, d_u)
        plan.run(kernels.backward, plan.steps, given)
        d_log_w = None if log_w is None else _whole(d_decay, log_w)
        d_constant = d_decay.sum((0, 1)) if log_w is None else None
        return [_whole(d_r, r), d_log_w, _whole(d_k, k), _whole(d_v, v)], [d_constant, d_u.sum((0, 1))], [d_begin]


class _Plan:
    """How a call is cut into programs."""

    def __init__(self, call: Call) -> None:
        (r, log_w, k, v), _, (state,), where, options = call
        self.tokens = r.shape[0] * r.shape[1]
        self.H, self.K, self.V = state.shape[1:]
        self.at = gpu.place(r, where, _CHUNK)
        self.steps = self.at.slots * (_CHUNK // _STEP)
        dtype = state.dtype
        if dtype == torch.float32:
            dtype = torch.promote_types(torch.promote_types(r.dtype, k.dtype), v.dtype)
        most = _TILE if dtype.itemsize == 2 else _TILE_WIDE
        self.tile_k, self.tile_v = (min(most, max(16, 1 << (x - 1).bit_length())) for x in (self.K, self.V))
        self.tiles_k, self.tiles_v = -(-self.K // self.tile_k), -(-self.V // self.tile_v)
        # Sums of log decays, and of what comes back to them, are products with zeros and ones: exact in bfloat16, in as
        # many pieces as there are digits.
        pieces = {torch.float64: 0, torch.float32: 3}.get(dtype, 2)
        digits = 1 if pieces and log_w is not None and log_w.dtype == torch.bfloat16 else pieces
        self.constants: dict[str, Any] = {
            "C": _CHUNK,
            "L": _STEP,
            "KB": self.tile_k,
            "VB": self.tile_v,
            "RAGGED": self.at.ragged,
            "PRECISION": gpu.dot_precision(dtype, options[0]),
            "HALF": gpu.dot_precision(torch.bfloat16),
            "DIGITS": digits,
            "PULLED": pieces - 1 if pieces == 2 and not options[0] else pieces,
            "CONSTANT": log_w is None,
        }

    def partial(self, x: Tensor, where: Some, tiles: int) -> Tensor:
        """Room for something like ``x``: itself, or one in the dtype of sums for each of several tiles."""
        if tiles == 1:
            return gpu.new(x, where)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        return gpu.new(x.new_empty(0, dtype=wide), where, (tiles, *x.shape))

    def states(self, kernels: Any, given: Sequence[Tensor], begin: Tensor, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """S before every chunk and after the last; or its cotangent after every chunk and before the first."""
        states = begin.new_empty(self.at.slots, *begin.shape[1:])
        keeps, end = begin.new_empty(states.shape[:3]), torch.empty_like(begin)
        self.run(kernels.summaries, self.at.slots, (*given, begin, states, keeps), REVERSE=reverse)
        blocks = -(-self.K * self.V // _ELEMENTS)
        sizes = {"C": _CHUNK, "E": _ELEMENTS, "RAGGED": self.at.ragged, "REVERSE": reverse}
        gpu.launch(
            kernels.scan,
            (self.at.rows, self.H, blocks),
            *(states, keeps, begin, end, *self.at.arguments[:3], self.H, self.K, self.V),
            **sizes,
        )
        return states, end

    def run(self, kernel: Any, programs: int, tensors: Sequence[Tensor], **constants: int) -> None:
        grid = (programs, self.H, self.tiles_k * self.tiles_v)
        sizes: tuple[int, ...] = (self.H, self.K, self.V, self.tiles_v)
        if not constants:  # but for the summaries, which write no outputs
            sizes, constants = (self.tokens, *sizes), {"LEVELS": _STEP.bit_length() - 1}

        gpu.launch(
            kernel,
            grid,
            *tensors,
            *self.at.arguments,
            *sizes,
            warps=_WARPS[kernel.__name__],
            stages=1,
            **self.constants,
            **constants,
        )


def _whole(parts: Tensor, like: Tensor) -> Tensor:
    return parts if parts.shape == like.shape else parts.sum(0).to(like.dtype)


_wkv6 = register_pair(
    "wkv6_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("r", "log_w", "k", "v"),
    shared=("constant", "u"),
    state=("state",),
    output="v",
    where=gpu.WHERE,
    options=("bool precise",),
    optional=("log_w", "constant"),
)


def wkv6(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor,
    state: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """r, k, v ``(B, T, H, ·)`` and log_w alike, of any dtypes; or log_w constant in time, ``(H, K)``. It then has the
    dtype of sums, as u and the state have."""
    constant = log_w.dim() == 2
    y, end = _wkv6(
        r,
        None if constant else log_w,
        k,
        v,
        log_w if constant else None,
        u,
        state,
        lengths,
        cu_seqlens,
        gpu.asked_precise(),
    )
    return y, end
