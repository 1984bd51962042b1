"""Bi-WKV in chunks: what stands before and after each chunk is summed first, then all chunks are read at once.

Legend: B batch, T time, n chunks, L positions of a chunk, C channels; a leading 2 is the direction: 0 reads left to
right, 1 right to left. In direction 1 the positions of a chunk are in reversed order, chunks are not.

A sum is held as (num, den, shift), meaning ``num·e^shift`` and ``den·e^shift``, and sums are only ever added. As in
``wkv4/parallel.py`` shifts are differentiated: the gradient of a token that outweighs all others is what theirs leave,
and with constant shifts it would be a difference of nearly equal numbers.

Forward remembers its inputs only. Backward differentiates in the three steps the output is made of (sums of chunks,
sums around chunks, outputs), the two large ones segment by segment: beyond gradients it needs the memory of one
segment and a few numbers per chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from statewise.ops.custom import operator
from statewise.ops.segments import _recording

__all__ = ["bi_wkv", "nothing"]

_CHUNK = 16
_SEGMENT = 16  # chunks

_Sum = tuple[Tensor, Tensor, Tensor]


def nothing(dtype: torch.dtype) -> float:
    """A key of no weight beside any other: finite, so that a row of nothing else stays free of NaN."""
    return torch.finfo(dtype).min / 4


def _chunked(x: Tensor, fill: float = 0.0) -> Tensor:
    """``(B, T, C)`` → ``(B, n, L, C)``, filled up at the end; a view where nothing is missing."""
    batch, time, channels = x.shape
    missing = -time % _CHUNK
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing), value=fill)
    return x.reshape(batch, (time + missing) // _CHUNK, _CHUNK, channels)


def _keys(k: Tensor) -> Tensor:
    """Keys in chunks, the largest of each row and channel taken out: the average does not know it, and what is left
    of keys that share a large offset is rounded far less."""
    return _chunked(k - k.amax(1, keepdim=True), nothing(k.dtype))


def _whole(x: Tensor, time: int) -> Tensor:
    """``(B, n, L, C)`` → ``(B, T, C)``."""
    return x.flatten(1, 2)[:, :time].contiguous()


def _both_ways(x: Tensor) -> Tensor:
    """``(B, n, L, C)`` → ``(2, B, n, L, C)``."""
    return torch.stack([x, x.flip(2)])


def _sums(k: Tensor, v: Tensor, log_w: Tensor) -> _Sum:
    """Every chunk as seen from its next neighbour in either direction, ``(2, B, n, C)``."""
    steps = torch.arange(_CHUNK - 1, 0, -1, device=k.device, dtype=k.dtype)[:, None] * log_w
    exponents = _both_ways(k) + torch.cat([steps, torch.zeros_like(log_w)[None]])  # no 0·(-inf) at the near end
    shift = exponents.amax(3)
    weights = torch.exp(exponents - shift[:, :, :, None])
    return (weights * _both_ways(v)).sum(3), weights.sum(3), shift


def _around(sums: _Sum, log_w: Tensor) -> _Sum:
    """What stands before each chunk in either direction, ``(2, B, n, C)``: the one pass from chunk to chunk."""
    walk = [torch.stack([x[0], x[1].flip(1)]) for x in sums]
    empty = torch.zeros_like(walk[0][:, :, 0])
    num, den, shift = empty, empty, torch.full_like(empty, -torch.inf)
    found = [(num, den, shift)]
    whole = _CHUNK * log_w
    for chunk_num, chunk_den, chunk_shift in list(zip(*[x.unbind(2) for x in walk], strict=True))[:-1]:
        faded = shift + whole
        shift = torch.maximum(faded, chunk_shift)
        old, now = torch.exp(faded - shift), torch.exp(chunk_shift - shift)
        num, den = old * num + now * chunk_num, old * den + now * chunk_den
        found.append((num, den, shift))
    num, den, shift = (torch.stack([x[0], x[1].flip(1)]) for x in (torch.stack(p, 2) for p in zip(*found, strict=True)))
    return num, den, shift


def _outputs(k: Tensor, v: Tensor, around: _Sum, log_w: Tensor, u: Tensor) -> Tensor:
    """``(B, n, L, C)``: each position's average of what stands on both sides of it and, at its bonus, itself."""
    num, den, shift = around
    nums, dens, shifts = [num], [den], [shift]
    for key, value in list(zip(_both_ways(k).unbind(3), _both_ways(v).unbind(3), strict=True))[:-1]:
        faded = shift + log_w
        shift = torch.maximum(faded, key)
        old, now = torch.exp(faded - shift), torch.exp(key - shift)
        num, den = old * num + now * value, old * den + now
        nums.append(num)
        dens.append(den)
        shifts.append(shift)
    left_num, left_den, left = (torch.stack([x[0] for x in part], 2) for part in (nums, dens, shifts))
    right_num, right_den, right = (torch.stack([x[1] for x in part[::-1]], 2) for part in (nums, dens, shifts))
    bonus = u + k
    top = torch.maximum(torch.maximum(left, right), bonus)
    before, after, now = torch.exp(left - top), torch.exp(right - top), torch.exp(bonus - top)
    return (before * left_num + after * right_num + now * v) / (before * left_den + after * right_den + now)


def _spans(k: Tensor) -> list[slice]:
    return [slice(start, start + _SEGMENT) for start in range(0, k.shape[1], _SEGMENT)]


def _all_sums(k: Tensor, v: Tensor, log_w: Tensor) -> _Sum:
    parts = [_sums(k[:, span], v[:, span], log_w) for span in _spans(k)]
    num, den, shift = (torch.cat(part, 2) for part in zip(*parts, strict=True))
    return num, den, shift


@operator("bi_wkv", schema="(Tensor k, Tensor v, Tensor log_w, Tensor u) -> Tensor")
def bi_wkv(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    """All tokens of ``(B, T, C)``, T ≥ 1, all tensors of one dtype. First derivatives only."""
    # Accumulation is in the dtype of the arguments, whatever the caller's autocast would like.
    with torch.autocast(k.device.type, enabled=False):
        keys, values = _keys(k), _chunked(v)
        num, den, shift = _around(_all_sums(keys, values, log_w), log_w)
        parts = [
            _outputs(keys[:, s], values[:, s], (num[:, :, s], den[:, :, s], shift[:, :, s]), log_w, u)
            for s in _spans(keys)
        ]
    return _whole(torch.cat(parts, 1), k.shape[1])


@bi_wkv.register_fake
def _(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@operator(
    "bi_wkv_backward",
    schema="(Tensor grad_y, Tensor k, Tensor v, Tensor log_w, Tensor u) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_y: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = k.device.type
    with torch.autocast(device, enabled=False):
        keys, values, grads = _keys(k), _chunked(v), _chunked(grad_y)
        sums = [x.requires_grad_() for x in _all_sums(keys, values, log_w)]
    d_keys, d_values = keys.new_empty(keys.shape), keys.new_empty(keys.shape)
    d_log_w, d_u = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (log_w, u))
    rate = log_w.detach().requires_grad_()
    with _recording(device):
        around = _around((sums[0], sums[1], sums[2]), rate)
    d_around = [torch.empty_like(x) for x in around]
    for span in _spans(keys):
        with _recording(device):
            live = [x.detach().requires_grad_() for x in (keys[:, span], values[:, span], log_w, u)]
            near = [x[:, :, span].detach().requires_grad_() for x in around]
            y = _outputs(live[0], live[1], (near[0], near[1], near[2]), live[2], live[3])
            found = torch.autograd.grad(y, [*live, *near], grads[:, span])
        d_keys[:, span], d_values[:, span] = found[0], found[1]
        d_log_w += found[2]
        d_u += found[3]
        for whole, part in zip(d_around, found[4:], strict=True):
            whole[:, :, span] = part
    if keys.shape[1] > 1:  # around a single chunk is nothing
        *d_sums, extra = torch.autograd.grad(around, [*sums, rate], d_around)
        d_log_w += extra
        for span in _spans(keys):
            with _recording(device):
                live = [x.detach().requires_grad_() for x in (keys[:, span], values[:, span], log_w)]
                found = torch.autograd.grad(_sums(*live), live, [x[:, :, span] for x in d_sums])
            d_keys[:, span] += found[0]
            d_values[:, span] += found[1]
            d_log_w += found[2]
    return _whole(d_keys, k.shape[1]), _whole(d_values, k.shape[1]), d_log_w, d_u


@_backward.register_fake
def _(grad_y: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_k, d_v, d_log_w, d_u = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v, log_w, u))
    return d_k, d_v, d_log_w, d_u


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward(grad_y, *ctx.saved_tensors))


bi_wkv.register_autograd(_differentiate, setup_context=_remember)
