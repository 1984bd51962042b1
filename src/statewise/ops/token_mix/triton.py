"""Launches the GPU kernels, triton_kernels.py. One operator of torch for any number of mixtures: it returns a list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.custom import operator

__all__ = ["token_mix"]

_MOST = 8  # mixtures of a launch: as many as a kernel has names for
_CHUNK = 64
# (channels of a program, warps, tokens loaded at once): none changes a sum.
_CHOICES = {
    "forward": ((256, 4, 4), (512, 4, 4), (256, 4, 8)),
    "backward": ((256, 4, 2), (512, 4, 1), (512, 4, 2)),
}


def _run(kernel: Any, tensors: Sequence[Tensor], many: Sequence[Tensor], where: Sequence[Tensor | None]) -> None:
    x, C, M = tensors[0], tensors[0].shape[-1], len(many)
    at = gpu.place(x, where, _CHUNK)
    names = [*many, *[None] * (_MOST - M)]

    def run(choice: tuple[int, int, int]) -> None:
        block, warps, group = choice
        grid = (at.slots, -(-C // block))
        sizes = {"M": M, "L": _CHUNK, "S": group, "CB": block, "RAGGED": at.ragged}
        gpu.launch(kernel, grid, *tensors, *names, *at.arguments, C, warps=warps, **sizes)

    run(
        gpu.tune(f"token_mix {kernel.__name__} {x.dtype} M{M} C{min(C, 256)}", x.device, _CHOICES[kernel.__name__], run)
    )


@operator(
    "token_mix_triton",
    device_types=("cuda", "cpu"),  # the CPU in Triton's interpreter
    schema=f"(Tensor x, Tensor mix, Tensor state, {', '.join(gpu.WHERE)}) -> Tensor[]",
)
def _forward(x: Tensor, mix: Tensor, state: Tensor, *where: Tensor | None) -> list[Tensor]:
    from statewise.ops.token_mix import triton_kernels as kernels

    x, mix, state = (given.contiguous() for given in (x, mix, state))
    ys, end = [gpu.new(x, where) for _ in mix], torch.empty_like(state)
    _run(kernels.forward, (x, mix, state, end), ys, where)
    return [*ys, end]


@_forward.register_fake
def _(x: Tensor, mix: Tensor, state: Tensor, *where: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(given, memory_format=torch.contiguous_format) for given in [*[x] * len(mix), state]]


@operator(
    "token_mix_triton_backward",
    device_types=("cuda", "cpu"),
    schema=f"(Tensor x, Tensor mix, Tensor state, {', '.join(gpu.WHERE)}, Tensor[] pulls) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    x: Tensor, mix: Tensor, state: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, pulls: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    from statewise.ops.token_mix import triton_kernels as kernels

    where = lengths, cu_seqlens
    x, mix, state, *pulls, pull_end = (given.contiguous() for given in (x, mix, state, *pulls))
    d_x, d_state = gpu.new(x, where), torch.empty_like(state)
    d_mix = mix.new_empty(gpu.place(x, where, _CHUNK).slots, *mix.shape)
    _run(kernels.backward, (x, mix, state, pull_end, d_x, d_mix, d_state), pulls, where)
    return d_x, d_mix.sum(0), d_state


@_backward.register_fake
def _(x: Tensor, mix: Tensor, state: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(given, memory_format=torch.contiguous_format) for given in (x, mix, state))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, pulls: Sequence[Tensor]) -> tuple[Any, ...]:
    return (*_backward(*ctx.saved_tensors, list(pulls)), None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def token_mix(
    x: Tensor, mix: Tensor, state: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """x ``(B, T, C)`` of any dtype; mix ``(M, C)`` and state have the dtype of sums."""
    outputs: list[Tensor] = []
    for part in torch.split(mix, _MOST):
        *ys, end = _forward(x, part, state, lengths, cu_seqlens)
        outputs += ys
    return tuple(outputs), end
