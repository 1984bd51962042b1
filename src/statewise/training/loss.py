"""Next-token cross-entropy, with RWKV's pull on the largest logit.

Legend: B batch, T time, V vocabulary, n = B·T positions that are not ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from statewise.ops.checks import values_are_read

__all__ = ["language_model_loss"]

# Positions are worked through in slices of this many logits: what is widened to float32 at a time stays small.
_SLICE = 1 << 22


def language_model_loss(logits: Tensor, targets: Tensor, *, l2wrap: float = 0.0, ignore_index: int = -100) -> Tensor:
    """Mean cross-entropy in nats: ``loss = 1/n · Σ (logsumexp(logits_t) - logits_t[target_t])``.

    L2Wrap (RWKV-LM's trainer) leaves the value alone and adds, to the gradient of each position's largest logit (the
    first of equals), ``l2wrap / n · maxlogit``. That term is scaled by the incoming gradient like everything else, so
    it is right under gradient accumulation and loss scaling; RWKV-LM's older form, which is not scaled, gives the same
    numbers only for an incoming gradient of 1.

    Memory: only the logits are kept for the backward pass, which allocates one tensor of their size, their gradient;
    softmax is computed twice rather than kept. It is differentiable once.

    Args:
        logits: ``(..., V)``, floating point; half precision is computed in float32.
        targets: ``(...)``, int64, each in ``0..V-1`` or ``ignore_index``.
        l2wrap: 0 is plain cross-entropy; RWKV's recipe is 1e-4.
        ignore_index: positions with this target get no gradient, L2Wrap included, and do not count in n.

    Returns:
        A scalar, float32 (float64 for float64 logits); 0 when every position is ignored.

    Raises:
        ValueError: shapes that do not fit, or a target out of range (not looked for inside ``torch.compile``,
            nor inside :func:`statewise.ops.checks.trusting_values`).
    """
    if logits.dim() < 1 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits have dtype {logits.dtype} and shape {tuple(logits.shape)}; need floats (..., V)")
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)}; logits {tuple(logits.shape)} need {tuple(logits.shape[:-1])}"
        )
    if targets.dtype.is_floating_point or targets.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(f"targets have dtype {targets.dtype}; integers are accepted")
    if not 0.0 <= l2wrap < float("inf"):
        raise ValueError(f"l2wrap is {l2wrap}; a finite number of 0 or more is accepted")
    vocab = logits.shape[-1]
    flat, wanted = logits.reshape(-1, vocab), targets.reshape(-1).long()
    if values_are_read():
        outside = ((wanted < 0) | (wanted >= vocab)) & (wanted != ignore_index)
        if bool(outside.any()):
            raise ValueError(
                f"targets hold {int(wanted[outside][0])}; accepted are 0 to {vocab - 1} and {ignore_index} (ignored)"
            )
    loss: Tensor = _CrossEntropy.apply(flat, wanted, float(l2wrap), ignore_index)  # type: ignore[no-untyped-call]
    return loss


def _slices(rows: int, vocab: int) -> list[slice]:
    # A compiler fuses the widening into the sums by itself, and would unroll this loop.
    size = max(1, rows if torch.compiler.is_compiling() else _SLICE // max(vocab, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, l2wrap: float, ignore_index: int) -> Tensor:
        rows, vocab = logits.shape
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        kept = targets != ignore_index
        index = torch.where(kept, targets, 0)[:, None]
        losses = [logits.new_zeros(0, dtype=wide)]
        for part in _slices(rows, vocab):
            scores = torch.log_softmax(logits[part], dim=-1, dtype=wide)
            losses.append(scores.gather(1, index[part])[:, 0].neg())
        loss, count = torch.cat(losses), kept.sum().clamp(min=1)
        ctx.save_for_backward(logits, targets, count)
        ctx.l2wrap, ctx.ignore_index = l2wrap, ignore_index
        # `where`, not a product: an ignored position may hold anything, NaN included.
        return torch.where(kept, loss, 0.0).sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        logits, targets, count = ctx.saved_tensors
        rows, vocab = logits.shape
        kept = targets != ctx.ignore_index
        index = torch.where(kept, targets, 0)[:, None]
        scale = upstream / count
        whole = torch.empty_like(logits)
        for part in _slices(rows, vocab):
            gradient = torch.softmax(logits[part], dim=-1, dtype=upstream.dtype)
            gradient.scatter_(1, index[part], gradient.gather(1, index[part]) - 1.0)
            if ctx.l2wrap:
                largest, where = logits[part].max(dim=-1, keepdim=True)
                gradient.scatter_(1, where, gradient.gather(1, where) + ctx.l2wrap * largest.to(gradient.dtype))
            whole[part] = gradient.mul_(scale).masked_fill_(~kept[part, None], 0.0)
        return whole, None, None, None
