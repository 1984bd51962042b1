"""Rows of unequal length: right padding (``lengths``) and packing (``cu_seqlens``).

Legend: B rows, T time, n packed sequences. Time is axis 1.

Padding is made harmless by replacing it *before* an operator reads it (a NaN times zero is still NaN), so no value and
no gradient crosses. A packed row is unpacked into padded batches, bucketed by length so that padding at most doubles
the work, and its outputs are put back in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["blank", "check_ragged", "run_packed", "valid_steps"]

#: What an operator does with one padded batch:
#: (inputs with a time axis, state leaves, lengths) → (y, new state leaves).
Padded = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]


def _check_integers(op: str, name: str, value: Tensor, size: int | None, device: torch.device) -> None:
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype not in (torch.int64, torch.int32):
        came = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{op}: {name} must be a 1-D int64 tensor, got {came}")
    if size is not None and value.shape[0] != size:
        raise ValueError(f"{op}: {name} has {value.shape[0]} entries for a batch of {size}")
    if value.device != device:
        raise ValueError(f"{op}: {name} lies on {value.device}, the inputs on {device}")


def check_ragged(
    op: str, lengths: Tensor | None, cu_seqlens: Tensor | None, batch: int, time: int, device: torch.device
) -> int:
    """Check both arguments; return how many rows the state has. Values are read only outside of tracing.

    Raises:
        ValueError: both given, wrong dtype or shape, or values out of order or range.
    """
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(f"{op}: lengths and cu_seqlens were both given; a batch is padded or packed, not both")
    tracing = torch.compiler.is_compiling()
    if lengths is not None:
        _check_integers(op, "lengths", lengths, batch, device)
        if not tracing and batch and not (int(lengths.min()) >= 0 and int(lengths.max()) <= time):
            raise ValueError(f"{op}: lengths {lengths.tolist()} must lie in 0..{time}")
    if cu_seqlens is None:
        return batch
    _check_integers(op, "cu_seqlens", cu_seqlens, None, device)
    if batch != 1:
        raise ValueError(f"{op}: cu_seqlens packs sequences into one row, got a batch of {batch}")
    if cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens is empty; it starts with 0 and ends with T={time}")
    if not tracing:
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != time or any(b < a for a, b in itertools.pairwise(ends)):
            raise ValueError(f"{op}: cu_seqlens must run from 0 to T={time} without falling, got {ends}")
    return cu_seqlens.shape[0] - 1


def valid_steps(lengths: Tensor, time: int) -> Tensor:
    """``(B, T)`` bool: which steps belong to their row."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def blank(x: Tensor, valid: Tensor, value: float = 0.0) -> Tensor:
    """``x`` with every step that is not valid replaced by ``value``; no gradient reaches those steps."""
    return torch.where(valid.reshape(*valid.shape, *[1] * (x.dim() - 2)), x, value)


def run_packed(
    operator: Padded, inputs: Sequence[Tensor], state: Sequence[Tensor], cu_seqlens: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Run ``operator`` on the sequences packed in row 0 of every input.

    Args:
        operator: serves one padded batch.
        inputs: each ``(1, T, ...)``, T ≥ 1.
        state: leaves, each ``(n, ...)``.
        cu_seqlens: ``(n + 1,)`` checked boundaries.

    Returns:
        y ``(1, T, ...)`` and the new leaves ``(n, ...)``.
    """
    starts = cu_seqlens[:-1].long()
    lengths = cu_seqlens[1:].long() - starts
    total = inputs[0].shape[1]
    if torch.compiler.is_compiling():  # lengths are unknown to a tracer: one bucket as wide as the row
        buckets = [(torch.arange(lengths.shape[0], device=lengths.device), total)]
    else:
        buckets = _buckets(lengths)
    rows_of = []
    y_parts: list[Tensor] = []
    places: list[Tensor] = []
    state_parts: list[Sequence[Tensor]] = []
    for rows, width in buckets:
        count = lengths[rows]
        steps = torch.arange(width, device=lengths.device)
        index = (starts[rows, None] + steps).clamp(max=max(total - 1, 0))  # (rows, width)
        padded = [x[0].index_select(0, index.flatten()).view(*index.shape, *x.shape[2:]) for x in inputs]
        y, new = operator(padded, [leaf.index_select(0, rows) for leaf in state], count)
        # Padding writes to one extra place at the end, which is cut off.
        places.append(torch.where(steps < count[:, None], index, total).flatten())
        y_parts.append(y.flatten(0, 1))
        state_parts.append(new)
        rows_of.append(rows)
    source = torch.cat(y_parts)
    y = source.new_zeros(total + 1, *source.shape[1:]).index_copy(0, torch.cat(places), source)[:total]
    order = torch.argsort(torch.cat(rows_of))
    leaves = [torch.cat(parts).index_select(0, order) for parts in zip(*state_parts, strict=True)]
    return y[None], leaves


def _buckets(lengths: Tensor) -> list[tuple[Tensor, int]]:
    """Rows grouped so that the longest of a group is less than twice its shortest; (rows, longest).

    A bucket of empty sequences is one step wide, since an operator is never given T = 0."""
    groups: dict[int, list[int]] = {}
    sizes = lengths.tolist()
    for row, size in enumerate(sizes):
        groups.setdefault(size.bit_length(), []).append(row)
    return [
        (torch.tensor(rows, device=lengths.device), max(1, *(sizes[row] for row in rows)))
        for _, rows in sorted(groups.items())
    ]
