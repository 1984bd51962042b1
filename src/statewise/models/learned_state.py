"""A beginning that is learnt: what RWKV-5, 6 and 7 remember before the first token, where a file says more than zeros.

Legend: B rows, H heads, K key rows, V value columns.
"""

from __future__ import annotations

from torch import Tensor

from statewise.ops.checks import accumulation_dtype

__all__ = ["first_wkv"]


def first_wkv(time_state: Tensor | None, rows: int) -> Tensor | None:
    """The state of the recurrence before the first token of ``rows`` sequences.

    Args:
        time_state: ``(H, V, K)``, the axes of the published files' `att.time_state` in every generation (RWKV-LM's
            kernels hold a state so; :mod:`statewise.state` has K before V); ``None`` where nothing was learnt.
        rows: B, or how many sequences are packed.

    Returns:
        ``(B, H, K, V)`` of memory of its own, float32 (float64 for float64), through which gradients reach
        ``time_state``; ``None`` for ``None``, which is how operators are told to begin with zeros.
    """
    if time_state is None:
        return None
    wkv = time_state.to(accumulation_dtype(time_state)).transpose(1, 2)
    return wkv.expand(rows, *wkv.shape).clone()
