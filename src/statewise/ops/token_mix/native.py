"""Binds the C++ kernel, csrc/token_mix.cpp: an operator of torch for each number of mixtures up to 8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from statewise.ops.custom import operator
from statewise.ops.kernels import blank_like, call_kernel, covers

__all__ = ["token_mix"]


def _register(count: int) -> Callable[..., tuple[Tensor, ...]]:
    outputs = ", ".join(["Tensor"] * (count + 1))

    @operator(
        f"token_mix_{count}_native",
        device_types="cpu",
        schema=f"(Tensor x, Tensor mix, Tensor state, Tensor spans) -> ({outputs})",
    )
    def forward(x: Tensor, mix: Tensor, state: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
        x, mix, state, spans = (given.contiguous() for given in (x, mix, state, spans))
        whole = covers(spans, x.shape[0])
        ys = [blank_like(x, whole) for _ in range(count)]
        end = torch.empty_like(state)
        sizes = (spans.shape[0], x.shape[1], count)
        call_kernel("token_mix_forward", x.dtype, x, mix, spans, *sizes, state, ys, end)
        return (*ys, end)

    @forward.register_fake
    def _(x: Tensor, mix: Tensor, state: Tensor, spans: Tensor) -> tuple[Tensor, ...]:
        like = [*[x] * count, state]
        return tuple(torch.empty_like(given, memory_format=torch.contiguous_format) for given in like)

    grads = ", ".join(f"Tensor grad_{i}" for i in range(count))

    @operator(
        f"token_mix_{count}_native_backward",
        device_types="cpu",
        schema=f"(Tensor x, Tensor mix, Tensor state, Tensor spans, {grads}, Tensor grad_end)"
        " -> (Tensor, Tensor, Tensor)",
    )
    def backward(x: Tensor, mix: Tensor, state: Tensor, spans: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
        x, mix, state, spans, *cotangents = (  # type: ignore[assignment]
            given.contiguous() for given in (x, mix, state, spans, *cotangents)
        )
        d_x = blank_like(x, covers(spans, x.shape[0]))
        d_mix, d_state = mix.new_empty(spans.shape[0], *mix.shape), torch.empty_like(state)
        sizes = (spans.shape[0], x.shape[1], count)
        pulls = list(cotangents[:count])
        call_kernel(
            "token_mix_backward", x.dtype, x, mix, spans, *sizes, state, pulls, cotangents[count], d_x, d_mix, d_state
        )
        return d_x, d_mix.sum(0), d_state

    @backward.register_fake
    def _(x: Tensor, mix: Tensor, state: Tensor, spans: Tensor, *cotangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(given, memory_format=torch.contiguous_format) for given in (x, mix, state))

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        return (*backward(*ctx.saved_tensors, *cotangents), None)

    forward.register_autograd(differentiate, setup_context=setup_context)
    return forward


_FORMS = {count: _register(count) for count in range(1, 9)}  # RWKV-7 needs 6


def token_mix(x: Tensor, mix: Tensor, state: Tensor, spans: Tensor) -> tuple[list[Tensor], Tensor]:
    """Sequences ``spans`` of the rows of x ``(B, T, C)``; mix ``(M, C)`` and state have the dtype of sums."""
    rows = x.flatten(0, 1)
    outputs: list[Tensor] = []
    for part in torch.split(mix, max(_FORMS)):
        *ys, end = _FORMS[part.shape[0]](rows, part, state, spans)
        outputs += [y.view(x.shape) for y in ys]
    return outputs, end
