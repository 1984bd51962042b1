"""Launches the GPU kernels, triton_kernels.py.

Legend: N state size, NB that as a power of two, E channels of a group, CB channels of a program, S tokens of a segment,
K tokens between kept states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.registration import Call, Gradients, Results, Some, register_pair

__all__ = ["MOST_NUMBERS", "selective_scan"]

#: Largest N.
MOST_NUMBERS = 256
_KEEP = 64  # K
_SEGMENT = 128  # S, a multiple of K
# With fewer channels than this in all sequences together, a program each sequence and tile would leave a GPU idle: T is
# cut into segments. Sequences of a packed row count as one, since nothing is known of their lengths. By shape alone.
_FEW = 1 << 14


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


class _Sizes(NamedTuple):
    """Sizes of one call, and where its segments lie."""

    C: int
    E: int
    G: int
    N: int
    NB: int
    split: bool
    segments: gpu.Where

    @property
    def slots(self) -> int:
        """Programs a tile of channels."""
        return self.segments.slots if self.split else self.segments.rows

    def tiles(self, CB: int) -> int:
        return self.G * -(-self.E // CB)

    def widths(self) -> list[tuple[int, int]]:
        """Choices of (CB, warps) where nothing is summed over channels: at most 64 numbers a thread."""
        most = min(128, max(32, _power(self.E)))
        found = [(CB, CB // 32 * max(1, self.NB // 64)) for CB in (128, 64, 32) if most >= CB]
        # Two channels a thread: fewer threads, that share more.
        return [*found, (256, 4)] if self.E >= 256 and self.NB <= 16 else found

    def width_back(self) -> tuple[int, int]:
        """(CB, warps) where there are sums over channels, so by shape alone: at most 16 numbers a thread."""
        CB = min(128, max(32, _power(self.E)), max(32, 4096 // self.NB))
        return CB, max(CB // 32, self.NB * CB // 512)


def _sizes(call: Call) -> _Sizes:
    x, _, B, _, _ = call.inputs
    G, N = B.shape[2:]
    C = x.shape[-1]
    split = x.shape[0] * C < _FEW and x.shape[1] > _SEGMENT
    return _Sizes(C, C // G, G, N, _power(N), split, gpu.place(x, call.where, _SEGMENT))


class _Kernels:
    """x, dt, B, C, z; A, D, dt_bias; the state. Options: whether dt goes through softplus."""

    def kept_shape(self, call: Call) -> tuple[int, ...]:
        x, (state,) = call.inputs[0], call.leaves
        return gpu.place(x, call.where, _KEEP).slots, state.shape[2], state.shape[1]

    def forward(self, call: Call, keep: bool) -> Results:
        from statewise.ops.selective_scan import triton_kernels as kernels

        call = _widened(call)
        (x, dt, B, C, z), (A, D, bias), (state,), where, options = call
        size = _sizes(call)
        y, end = gpu.new(x, where), torch.empty_like(state)
        kept = state.new_empty(self.kept_shape(call) if keep else (0,))
        begin = self._starts(size, call, None, state, end) if size.split else state
        tensors = (x, dt, B, C, z, A, D, bias, begin, y, end, kept)
        constants = _has(z, D, bias) | {"KEEP": keep, "SPLIT": size.split, "SOFTPLUS": options[0]}

        def run(choice: tuple[int, int]) -> None:
            CB, warps = choice
            tiles = size.tiles(CB)
            numbers = (tiles, size.C, size.E, size.G, size.N, *_strides(size))
            at = size.segments.arguments
            grid = (size.slots * tiles,)
            gpu.launch(kernels.forward, grid, *tensors, *at, *numbers, warps=warps, **constants, **_tile(size, CB))

        run(gpu.tune(_key("forward", size, x, constants), x.device, size.widths(), run))
        return y, [end], kept

    def backward(self, call: Call, ends: Some, kept: Tensor, grad_y: Tensor, grad_ends: Some) -> Gradients:
        from statewise.ops.selective_scan import triton_kernels as kernels

        narrow, call = call.inputs[2:4], _widened(call)
        (x, dt, B, C, z), (A, D, bias), (state,), where, options = call
        (grad_end,), size = grad_ends, _sizes(call)
        CB, warps = size.width_back()
        tiles, tokens = size.tiles(CB), x.shape[0] * x.shape[1]
        d_state = torch.empty_like(state)
        last = grad_end
        if size.split:
            last = self._starts(size, call, grad_y, grad_end, d_state)
        programs = size.slots * tiles
        d_x, d_dt, d_z = gpu.new(x, where), gpu.new(dt, where), None if z is None else gpu.new(z, where)
        d_B, d_C = (gpu.new(state, where, (tiles // size.G, *B.shape)) for _ in range(2))
        d_A = state.new_empty(size.slots, size.N, size.C)
        d_D = None if D is None else state.new_empty(size.slots, size.C)
        d_bias = None if bias is None else state.new_empty(size.slots, size.C)
        own = state.new_empty(programs * (_KEEP // 4) * size.NB * CB)
        given = (x, dt, B, C, z, A, D, bias, kept, own, grad_y, last)
        found = (d_x, d_dt, d_B, d_C, d_z, d_A, d_D, d_bias, d_state)
        numbers = (tokens, tiles, size.C, size.E, size.G, size.N, *_strides(size))
        constants = _has(z, D, bias) | {"SPLIT": size.split, "SOFTPLUS": options[0]}
        at = size.segments.arguments
        gpu.launch(
            kernels.backward, (programs,), *given, *found, *at, *numbers, warps=warps, **constants, **_tile(size, CB)
        )
        summed = [d_A.sum(0).t().contiguous(), *(None if d is None else d.sum(0) for d in (d_D, d_bias))]
        shared = [parts.sum(0).to(given.dtype) for parts, given in zip((d_B, d_C), narrow, strict=True)]
        return [d_x, d_dt, *shared, d_z], summed, [d_state]

    def _starts(self, size: _Sizes, call: Call, grad_y: Tensor | None, begin: Tensor, last: Tensor) -> Tensor:
        """What every segment starts from, (slots, N, C); with ``grad_y`` the gradients that reach their ends.

        ``last`` is filled with what is left after all of them."""
        from statewise.ops.selective_scan import triton_kernels as kernels

        (x, dt, B, C, z), (A, _, bias), _, _, options = call
        back = grad_y is not None
        ends, total = begin.new_empty(size.slots, size.N, size.C), begin.new_empty(size.slots, size.C)
        at = size.segments.arguments
        given = (None, dt, None, C, z) if back else (x, dt, B, None, None)
        tensors = (*given, A, bias, grad_y, total, ends)
        constants = {"SOFTPLUS": options[0], "HAS_Z": given[4] is not None, "HAS_BIAS": bias is not None, "BACK": back}

        def run(choice: tuple[int, int]) -> None:
            CB, warps = choice
            tiles = size.tiles(CB)
            numbers = (tiles, size.C, size.E, size.G, size.N)
            grid = (size.slots * tiles,)
            gpu.launch(kernels.summary, grid, *tensors, *at, *numbers, warps=warps, **constants, **_tile(size, CB))

        run(gpu.tune(_key("summary", size, x, constants), x.device, size.widths(), run))
        block = 256
        blocks = -(-size.C * size.N // block)
        grid, numbers = (size.segments.rows * blocks,), (blocks, size.C, size.N)
        sizes = {"BACK": back, "RAGGED": size.segments.ragged, "S": _SEGMENT, "CB": block}
        gpu.launch(kernels.join, grid, A, total, ends, begin, last, *at[:3], *numbers, **sizes)
        return ends


def _widened(call: Call) -> Call:
    """B and C in the dtype of sums: far smaller than x, but every thread would convert all of a token's numbers."""
    (x, dt, B, C, z), (state,) = call.inputs, call.leaves
    return call._replace(inputs=(x, dt, B.to(state.dtype), C.to(state.dtype), z))


def _has(z: Tensor | None, D: Tensor | None, bias: Tensor | None) -> dict[str, bool]:
    return {"HAS_Z": z is not None, "HAS_D": D is not None, "HAS_BIAS": bias is not None}


def _tile(size: _Sizes, CB: int) -> dict[str, int]:
    full = size.N == size.NB
    return {"RAGGED": size.segments.ragged, "S": _SEGMENT, "K": _KEEP, "NB": size.NB, "CB": CB, "FULL": full}


def _strides(size: _Sizes) -> tuple[int, int]:
    """Of a state: between channels and between numbers."""
    return (1, size.C) if size.split else (size.N, 1)


def _key(name: str, size: _Sizes, x: Tensor, constants: dict[str, Any]) -> str:
    told = " ".join(f"{k}{int(v)}" for k, v in constants.items())
    return f"selective_scan {name} {x.dtype} N{size.NB} C{min(size.C, 4096)} R{size.segments.ragged} {told}"


_selective_scan = register_pair(
    "selective_scan_triton",
    _Kernels(),
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    time=("x", "dt", "B", "C", "z"),
    shared=("A", "D", "dt_bias"),
    state=("state",),
    output="x",
    where=gpu.WHERE,
    options=("bool softplus",),
    optional=("z", "D", "dt_bias"),
)


def selective_scan(
    inputs: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    softplus: bool,
    state: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x, dt, B, C, z, each of its own dtype; B and C have groups. A, D, dt_bias and state have the dtype of sums; z, D
    and dt_bias may be ``None``."""
    y, end = _selective_scan(*inputs, *parameters, state, lengths, cu_seqlens, softplus)
    return y, end
