"""What a tensor file says it holds, and the one place where that is believed: after it was checked against the file."""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from statewise.errors import WeightsError

__all__ = ["LARGEST_HEADER", "Claim", "counted", "read_claims"]

#: Bytes of a header or pickle that are looked into: some 15,000 tensors. Parsed, it takes up to thirty times its size.
LARGEST_HEADER = 2 << 20
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_PIECE = 1 << 24  # bytes read at a time


# Readers of every format lie between who wants to know and who reads; a context saves them an argument each.
_COUNT: ContextVar[Callable[[int], None] | None] = ContextVar("count", default=None)


@contextlib.contextmanager
def counted(count: Callable[[int], None]) -> Iterator[None]:
    """Within, ``count`` is called with the number of bytes of every piece of a tensor that was read."""
    before = _COUNT.set(count)
    try:
        yield
    finally:
        _COUNT.reset(before)


class Claim(NamedTuple):
    """A tensor somewhere in a file.

    ``start``, ``size``: its bytes in the file. ``shape``, ``dtype``: of the result. ``decode``: from the raw bytes to
    the flat tensor, where they are not the tensor itself. ``crc``: the checksum that the file says these bytes have.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    decode: Callable[[Tensor], Tensor] | None = None
    crc: int | None = None


def read_claims(path: Path, claims: Iterable[Claim]) -> dict[str, Tensor]:
    """Read what was claimed, one tensor at a time: memory never holds more than the tensors and one raw piece.

    Raises:
        WeightsError: a claim that cannot be true: names the file, the tensor and the reason.
    """
    with open(path, "rb") as handle:
        length = handle.seek(0, 2)
        checked = _check(path, list(claims), length)
        return {claim.name: _read(path, handle, claim) for claim in checked}


def _check(path: Path, claims: list[Claim], length: int) -> list[Claim]:
    if not claims:
        raise WeightsError(f"{path}: holds no tensors")
    if len(claims) > _MOST_TENSORS:
        raise WeightsError(f"{path}: claims {len(claims)} tensors; at most {_MOST_TENSORS} are accepted")
    seen: set[str] = set()
    for name, dtype, shape, start, size, decode, _ in claims:
        if name in seen:
            raise WeightsError(f"{path}: two tensors are called {name}")
        seen.add(name)
        if len(shape) > _MOST_AXES or any(axis < 0 for axis in shape):
            raise WeightsError(f"{path}: tensor {name} has shape {shape}; at most {_MOST_AXES} axes are accepted")
        if decode is None and math.prod(shape) * dtype.itemsize != size:
            raise WeightsError(
                f"{path}: tensor {name} of shape {shape} and dtype {dtype} takes {math.prod(shape) * dtype.itemsize} "
                f"bytes; the file gives it {size}"
            )
        if start < 0 or size < 0 or start + size > length:
            raise WeightsError(f"{path}: tensor {name} lies at bytes {start}..{start + size} of a file of {length}")
    # A file cannot hold more than its length: what overlaps is told twice. (Tied weights are one record.)
    total = sum({(claim.start, claim.size): claim.size for claim in claims}.values())
    if total > length:
        raise WeightsError(f"{path}: tensors of {total} bytes overlap in a file of {length}")
    return claims


def _read(path: Path, handle: BinaryIO, claim: Claim) -> Tensor:
    raw = torch.empty(claim.size, dtype=torch.uint8)
    view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's stubs of Python 3.11 name no buffer
    handle.seek(claim.start)
    tell = _COUNT.get()
    crc, done = 0, 0
    while done < claim.size:
        count = handle.readinto(view[done : done + _PIECE])  # type: ignore[attr-defined]
        if not count:
            raise WeightsError(f"{path}: the file ends within tensor {claim.name}")
        if claim.crc is not None:
            crc = zlib.crc32(view[done : done + count], crc)
        done += count
        if tell is not None:
            tell(count)
    if claim.crc is not None and crc != claim.crc:
        raise WeightsError(f"{path}: tensor {claim.name} is damaged (checksum differs)")
    flat = raw.view(claim.dtype) if claim.decode is None else claim.decode(raw)
    return flat.view(claim.shape)
