"""Every bound a test holds an operator to, in one place. A bound is loosened here, in the open, or not at all.

All bounds are relative: the largest difference divided by the largest magnitude of what is compared (for gradients, of
the whole set of gradients of one kind of cotangent, since a gradient may cancel to nothing).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["FORMS", "Bound", "bound"]


class Bound(NamedTuple):
    """Largest relative difference allowed in outputs and states, and in gradients."""

    forward: float
    gradient: float


#: Two forms of one operator, float64: only the order of sums differs.
FORMS = Bound(1e-10, 1e-10)

# Against the float64 reference on the same (rounded) inputs.
_BY_DTYPE = {
    torch.float64: FORMS,
    torch.float32: Bound(2e-5, 1e-4),
    # y itself is rounded to 8 bits; sums inside stay float32
    torch.bfloat16: Bound(8e-3, 2e-2),
}
_BY_OP: dict[tuple[str, torch.dtype], Bound] = {}


def bound(op: str, dtype: torch.dtype) -> Bound:
    """The bound for ``op`` with inputs of ``dtype``, against the float64 reference."""
    return _BY_OP.get((op, dtype), _BY_DTYPE[dtype])
