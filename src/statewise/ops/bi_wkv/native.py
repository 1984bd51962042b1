"""Binds the C++ kernel, csrc/bi_wkv.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statewise.ops.custom import operator
from statewise.ops.kernels import blank_like, call_kernel, covers
from statewise.ops.memory import empty
from statewise.ops.registration import keeps

__all__ = ["bi_wkv"]

_MOST_STEPS = (1 << 16) - 1  # that are kept as 16 bits
_REVISION = 1  # of what is kept


@operator(
    "bi_wkv_native",
    device_types="cpu",
    schema="(Tensor k, Tensor v, Tensor log_w, Tensor u, Tensor spans, SymInt time, int keep)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, time: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    k, v, log_w, u, spans = (given.contiguous() for given in (k, v, log_w, u, spans))
    whole = covers(spans, v.shape[0])
    y = blank_like(v, whole)
    kept, steps = (empty(shape, dtype) for shape, dtype in _kept(v, log_w, time, keep))
    if keep and not whole:  # nothing returned is left to chance
        kept.zero_()
        steps.zero_()
    sizes = (spans.shape[0], v.shape[1], v.shape[0], int(steps.dtype == torch.int16))
    keeping = (kept, steps) if keep else (None, None)
    call_kernel("bi_wkv_forward", v.dtype, k, v, log_w, u, spans, *sizes, y, *keeping)
    return y, kept, steps


def _kept(v: Tensor, log_w: Tensor, time: int, keep: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Of every token, one over the denominator and the key of the largest exponent, and the average if y is not of its
    dtype; then how many steps that key has faded."""
    if not keeps("bi_wkv_native", keep, _REVISION):
        return [((0,), log_w.dtype), ((0,), torch.int16)]
    planes = 2 if v.dtype == log_w.dtype else 3
    return [((planes, *v.shape), log_w.dtype), (tuple(v.shape), torch.int16 if time <= _MOST_STEPS else log_w.dtype)]


@_forward.register_fake
def _(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, time: int, keep: int
) -> tuple[Tensor, Tensor, Tensor]:
    kept, steps = (log_w.new_empty(shape, dtype=dtype) for shape, dtype in _kept(v, log_w, time, keep))
    return torch.empty_like(v, memory_format=torch.contiguous_format), kept, steps


@operator(
    "bi_wkv_native_backward",
    device_types="cpu",
    schema="(Tensor k, Tensor v, Tensor log_w, Tensor u, Tensor spans, Tensor? y, Tensor kept, Tensor steps,"
    " Tensor grad_y) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    k: Tensor,
    v: Tensor,
    log_w: Tensor,
    u: Tensor,
    spans: Tensor,
    y: Tensor | None,
    kept: Tensor,
    steps: Tensor,
    grad_y: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v, log_w, u, spans, kept, steps, grad_y = (x.contiguous() for x in (k, v, log_w, u, spans, kept, steps, grad_y))
    y = None if y is None else y.contiguous()
    whole = covers(spans, v.shape[0])
    d_k, d_v = blank_like(k, whole), blank_like(v, whole)
    d_log_w, d_u = (x.new_empty(spans.shape[0], *x.shape) for x in (log_w, u))
    sizes = (spans.shape[0], v.shape[1], v.shape[0], int(steps.dtype == torch.int16))
    known = (k, v, log_w, u, spans, *sizes, y, kept, steps, grad_y)
    call_kernel("bi_wkv_backward", v.dtype, *known, d_k, d_v, d_log_w, d_u)
    return d_k, d_v, d_log_w.sum(0), d_u.sum(0)


@_backward.register_fake
def _(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, log_w, u))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, _, keep = inputs
    if not keep:
        raise RuntimeError("bi_wkv_native: called without `keep`, it cannot be differentiated")
    y, kept, steps = output
    ctx.mark_non_differentiable(kept, steps)
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.save_for_backward(*tensors, y if y.dtype == kept.dtype else None, kept, steps)


def _differentiate(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 7
    return (*_backward(*ctx.saved_tensors, grad_y), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor) -> Tensor:
    """Sequences ``spans`` of the rows of k, v ``(B, T, C)``, of one dtype; log_w and u of that of sums."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, log_w, u))
    y, *_ = _forward(k.flatten(0, 1), v.flatten(0, 1), log_w, u, spans, k.shape[1], _REVISION if keep else 0)
    found: Tensor = y.view(v.shape)
    return found
