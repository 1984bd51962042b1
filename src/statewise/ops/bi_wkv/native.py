"""Binds the C++ kernel, csrc/bi_wkv.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statewise.ops.kernels import blank_like, call_kernel, covers
from statewise.ops.memory import empty

__all__ = ["bi_wkv"]


@torch.library.custom_op(
    "statewise::bi_wkv_native",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor k, Tensor v, Tensor log_w, Tensor u, Tensor spans, bool keep) -> (Tensor, Tensor)",
)
def _forward(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    k, v, log_w, u, spans = (given.contiguous() for given in (k, v, log_w, u, spans))
    whole = covers(spans, v.shape[0])
    y = blank_like(v, whole)
    kept = empty(_kept_shape(v, keep), log_w.dtype)
    if keep and not whole:
        kept.zero_()  # nothing returned is left to chance
    sizes = (spans.shape[0], v.shape[1], v.shape[0])
    call_kernel("bi_wkv_forward", v.dtype, k, v, log_w, u, spans, *sizes, y, kept if keep else None)
    return y, kept


def _kept_shape(v: Tensor, keep: bool) -> tuple[int, ...]:
    """Average, one over the denominator, and largest exponent (a key and how many steps it faded) of every token."""
    return (4, *v.shape) if keep else (0,)


@_forward.register_fake
def _(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), log_w.new_empty(_kept_shape(v, keep))


@torch.library.custom_op(
    "statewise::bi_wkv_native_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor k, Tensor v, Tensor log_w, Tensor u, Tensor spans, Tensor kept, Tensor grad_y)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, kept: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k, v, log_w, u, spans, kept, grad_y = (x.contiguous() for x in (k, v, log_w, u, spans, kept, grad_y))
    whole = covers(spans, v.shape[0])
    d_k, d_v = blank_like(k, whole), blank_like(v, whole)
    d_log_w, d_u = (x.new_empty(spans.shape[0], *x.shape) for x in (log_w, u))
    sizes = (spans.shape[0], v.shape[1], v.shape[0])
    call_kernel("bi_wkv_backward", v.dtype, k, v, log_w, u, spans, *sizes, kept, grad_y, d_k, d_v, d_log_w, d_u)
    return d_k, d_v, d_log_w.sum(0), d_u.sum(0)


@_backward.register_fake
def _(
    k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor, kept: Tensor, grad_y: Tensor
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, log_w, u))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, keep = inputs
    if not keep:
        raise RuntimeError("bi_wkv_native: called without `keep`, it cannot be differentiated")
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what is kept
    ctx.save_for_backward(*tensors, output[1])


def _differentiate(ctx: Any, grad_y: Tensor | None, _: None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 6
    return (*_backward(*ctx.saved_tensors, grad_y), None, None)


_forward.register_autograd(_differentiate, setup_context=_setup_context)


def bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, spans: Tensor) -> Tensor:
    """Sequences ``spans`` of the rows of k, v ``(B, T, C)``, of one dtype; log_w and u of that of sums."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, log_w, u))
    y, _ = _forward(k.flatten(0, 1), v.flatten(0, 1), log_w, u, spans, keep)
    found: Tensor = y.view(v.shape)
    return found
