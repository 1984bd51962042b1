"""WKV-4 in chunks: all chunks advance together, position by position, then chunks are joined.

Legend: B batch, t tokens of one segment, n chunks, L positions of a chunk, C channels.

A sum is held as (num, den, shift), meaning ``num·e^shift`` and ``den·e^shift``. Joining two sums takes the larger
shift, so nothing overflows whatever the keys. The outputs do not depend on shifts, yet autograd must follow them: where
one term outweighs all others, its gradient is what the others' gradients leave, and only this way is it exactly that
(with shifts held constant it is a difference of nearly equal numbers, and in float32 often nothing but rounding).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from statewise.ops.segments import register_segmented
from statewise.state import WKV4State

__all__ = ["state_at", "wkv4"]

_CHUNK = 16
_SEGMENT = 512


def _segment(
    inputs: Sequence[Tensor], parameters: Sequence[Tensor], state: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    k, v = inputs
    log_w, u = parameters
    time = k.shape[1]
    pad = -time % _CHUNK
    batch, _, channels = k.shape
    keys, values = (torch.nn.functional.pad(x, (0, 0, 0, pad)).reshape(batch, -1, _CHUNK, channels) for x in (k, v))

    # Inside every chunk, from nothing: the sum after each position, (B, n, C) a position.
    num, shift = values[:, :, 0], keys[:, :, 0]
    den = torch.ones_like(num)
    nums, dens, shifts = [num], [den], [shift]
    for key, value in zip(keys.unbind(2)[1:], values.unbind(2)[1:], strict=True):
        faded = shift + log_w
        shift = torch.maximum(faded, key)
        old, now = torch.exp(faded - shift), torch.exp(key - shift)
        num, den = old * num + now * value, old * den + now
        nums.append(num)
        dens.append(den)
        shifts.append(shift)

    # From chunk to chunk: the sum before each chunk, (B, C) a chunk.
    whole = _CHUNK * log_w
    carry = (state[0], state[1], state[2])
    carries = [carry]
    for local in list(zip(num.unbind(1), den.unbind(1), shift.unbind(1), strict=True))[:-1]:
        carry = _join((carry[0], carry[1], carry[2] + whole), local)
        carries.append(carry)
    carried = [torch.stack(part, 1)[:, :, None] for part in zip(*carries, strict=True)]  # (B, n, 1, C)

    # Before each position: what came with the chunk, faded, beside what the chunk itself has seen.
    fade = torch.arange(1, _CHUNK, device=k.device, dtype=k.dtype)[:, None] * log_w
    faded = carried[2] + torch.cat([torch.zeros_like(log_w)[None], fade])  # no 0·(-inf) at position 0
    nothing = torch.zeros_like(keys[:, :, :1])
    local_num = torch.cat([nothing, torch.stack(nums[:-1], 2)], 2)
    local_den = torch.cat([nothing, torch.stack(dens[:-1], 2)], 2)
    local_shift = torch.cat([torch.full_like(nothing, -torch.inf), torch.stack(shifts[:-1], 2)], 2)
    bonus = u + keys
    top = torch.maximum(torch.maximum(faded, local_shift), bonus)
    before, inside, now = torch.exp(faded - top), torch.exp(local_shift - top), torch.exp(bonus - top)
    y = (before * carried[0] + inside * local_num + now * values) / (before * carried[1] + inside * local_den + now)

    at = (time - 1) % _CHUNK
    last = carried[2][:, -1, 0] + (at + 1) * log_w
    end = _join(
        (carried[0][:, -1, 0], carried[1][:, -1, 0], last), (nums[at][:, -1], dens[at][:, -1], shifts[at][:, -1])
    )
    return y.flatten(1, 2)[:, :time], list(end)


_Sum = tuple[Tensor, Tensor, Tensor]


def _join(a: _Sum, b: _Sum) -> _Sum:
    top = torch.maximum(a[2], b[2])
    left, right = torch.exp(a[2] - top), torch.exp(b[2] - top)
    return left * a[0] + right * b[0], left * a[1] + right * b[1], top


def _exponents(k: Tensor, log_w: Tensor, lengths: Tensor) -> Tensor:
    """``(B, T, C)``: each token's exponent in the state at its row's length; -inf for tokens past it."""
    steps = torch.arange(k.shape[1], device=k.device)
    age = (lengths[:, None] - 1 - steps).to(k.dtype)[..., None]
    # age 0 is set apart because 0·(-inf) is NaN
    faded = k + torch.where(age > 0, age.clamp(min=1) * log_w, 0.0)
    return torch.where(age >= 0, faded, -torch.inf)


def state_at(k: Tensor, v: Tensor, log_w: Tensor, state: WKV4State, lengths: Tensor) -> WKV4State:
    """The state of every row at its own length: one weighted sum over time, no recurrence."""
    exponents = _exponents(k, log_w, lengths)
    faded = state.max + lengths[:, None].clamp(min=1).to(k.dtype) * log_w
    top = torch.maximum(exponents.amax(1), faded)
    # Rows of length 0 are replaced below; a finite stand-in keeps NaN out of their gradients.
    top = torch.where((lengths > 0)[:, None], top, 0.0)
    weights = torch.exp(exponents - top[:, None])
    old = torch.exp(torch.where((lengths > 0)[:, None], faded - top, -torch.inf))
    new = WKV4State((weights * v).sum(1) + old * state.num, weights.sum(1) + old * state.den, top)
    alive = (lengths > 0)[:, None]
    return WKV4State(*[torch.where(alive, after, before) for after, before in zip(new, state, strict=True)])


_wkv4 = register_segmented(
    "wkv4",
    _segment,
    time=("k", "v"),
    shared=("log_w", "u"),
    state=("num", "den", "max"),
    output="v",
    segment=_SEGMENT,
)


def wkv4(k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: WKV4State) -> tuple[Tensor, WKV4State]:
    """All tokens of ``(B, T, C)``, T ≥ 1, all tensors of one dtype."""
    y, num, den, largest = _wkv4(k, v, log_w, u, *state)
    return y, WKV4State(num, den, largest)
