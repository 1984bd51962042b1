"""What a tensor file says it holds, and the one place where that is believed: after it was checked against the file."""

from __future__ import annotations

import contextlib
import math
import mmap
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from statewise.errors import WeightsError

__all__ = ["LARGEST_HEADER", "Blocks", "Claim", "counted", "read_claims"]

#: Bytes of a header or pickle that are looked into: some 15,000 tensors. Parsed, it takes up to thirty times its size.
LARGEST_HEADER = 2 << 20
_MOST_TENSORS = 100_000
_MOST_AXES = 8
_PIECE = 1 << 24  # bytes read at a time
_BLOCKS = 1 << 13  # blocks decoded at a time: what decoding takes besides grows with it


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


class Blocks(NamedTuple):
    """Values packed in blocks: ``size`` bytes for ``values`` of them.

    ``decode``: fills its second argument ``(blocks, values)``, of the claim's dtype, from its first ``(blocks, size)``
    uint8. Blocks are decoded some at a time, so that packed and unpacked tensor never stand side by side.
    """

    values: int
    size: int
    decode: Callable[[Tensor, Tensor], None]


class Claim(NamedTuple):
    """A tensor somewhere in a file.

    ``start``, ``size``: its bytes in the file. ``shape``, ``dtype``: of the result. ``blocks``: how it is packed, where
    the bytes are not the tensor itself. ``crc``: the checksum that the file says these bytes have.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    blocks: Blocks | None = None
    crc: int | None = None


def read_claims(
    path: Path, claims: Iterable[Claim], dtype: torch.dtype | None = None, *, mapped: bool = False
) -> dict[str, Tensor]:
    """Read what was claimed, one tensor at a time: memory never holds more than the results and one raw piece.

    Args:
        dtype: what floating-point tensors are cast to as they are read; ``None`` leaves them as they are.
        mapped: whether tensors that stay as they are lie in the file's own pages, which are read when they are first
            used, shared with other processes, and copied when they are written to; the file itself never changes, and
            must not be changed or cut by others meanwhile. Checksums are held against the file before.

    Raises:
        WeightsError: a claim that cannot be true: names the file, the tensor and the reason.
    """
    with open(path, "rb") as handle:
        length = handle.seek(0, 2)
        checked = _check(path, list(claims), length)
        # One piece for all: pieces that come and go between results that stay would leave holes in memory.
        room = torch.empty(min(length, _PIECE), dtype=torch.uint8)
        pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) if mapped else None
        return {claim.name: _read(path, handle, claim, dtype, room, pages) for claim in checked}


def _check(path: Path, claims: list[Claim], length: int) -> list[Claim]:
    if not claims:
        raise WeightsError(f"{path}: holds no tensors")
    if len(claims) > _MOST_TENSORS:
        raise WeightsError(f"{path}: claims {len(claims)} tensors; at most {_MOST_TENSORS} are accepted")
    seen: set[str] = set()
    for name, dtype, shape, start, size, blocks, _ in claims:
        if name in seen:
            raise WeightsError(f"{path}: two tensors are called {name}")
        seen.add(name)
        if len(shape) > _MOST_AXES or any(axis < 0 for axis in shape):
            raise WeightsError(f"{path}: tensor {name} has shape {shape}; at most {_MOST_AXES} axes are accepted")
        values, bytes_of = (1, dtype.itemsize) if blocks is None else blocks[:2]
        if math.prod(shape) * bytes_of != size * values:
            raise WeightsError(
                f"{path}: tensor {name} of shape {shape} and dtype {dtype} takes "
                f"{math.prod(shape) * bytes_of // values} bytes; the file gives it {size}"
            )
        if start < 0 or size < 0 or start + size > length:
            raise WeightsError(f"{path}: tensor {name} lies at bytes {start}..{start + size} of a file of {length}")
    # A file cannot hold more than its length: what overlaps is told twice. (Tied weights are one record.)
    total = sum({(claim.start, claim.size): claim.size for claim in claims}.values())
    if total > length:
        raise WeightsError(f"{path}: tensors of {total} bytes overlap in a file of {length}")
    return claims


def _read(
    path: Path, handle: BinaryIO, claim: Claim, dtype: torch.dtype | None, room: Tensor, pages: mmap.mmap | None
) -> Tensor:
    handle.seek(claim.start)
    if claim.blocks is not None:
        return _read_blocks(path, handle, claim, claim.blocks).view(claim.shape)
    as_it_is = dtype is None or dtype == claim.dtype or not claim.dtype.is_floating_point
    if as_it_is and pages is not None and claim.size and claim.start % claim.dtype.itemsize == 0:
        crc = 0
        for begin in range(0, claim.size if claim.crc is not None else 0, len(room)):
            crc = _fill(path, handle, claim, room[: claim.size - begin], crc)
        count = claim.size // claim.dtype.itemsize
        values = torch.frombuffer(pages, dtype=claim.dtype, count=count, offset=claim.start)
    elif as_it_is:
        raw = torch.empty(claim.size, dtype=torch.uint8)
        crc, values = _fill(path, handle, claim, raw), raw.view(claim.dtype)
    else:
        crc, values = 0, torch.empty(claim.size // claim.dtype.itemsize, dtype=dtype)
        for piece in torch.split(values, _PIECE // claim.dtype.itemsize):
            packed = room[: piece.numel() * claim.dtype.itemsize]
            crc = _fill(path, handle, claim, packed, crc)
            piece.copy_(packed.view(claim.dtype))
    if claim.crc is not None and crc != claim.crc:
        raise WeightsError(f"{path}: tensor {claim.name} is damaged (checksum differs)")
    return values.view(claim.shape)


def _read_blocks(path: Path, handle: BinaryIO, claim: Claim, blocks: Blocks) -> Tensor:
    values = torch.empty(claim.size // blocks.size, blocks.values, dtype=claim.dtype)
    raw = torch.empty(min(len(values), _BLOCKS) * blocks.size, dtype=torch.uint8)
    for begin in range(0, len(values), _BLOCKS):
        piece = values[begin : begin + _BLOCKS]
        packed = raw[: len(piece) * blocks.size]
        _fill(path, handle, claim, packed)
        blocks.decode(packed.view(-1, blocks.size), piece)
    return values


def _fill(path: Path, handle: BinaryIO, claim: Claim, raw: Tensor, crc: int = 0) -> int:
    """The next bytes of the claim, into ``raw``; their checksum after ``crc``, if there is one to hold it against."""
    view = memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's stubs of Python 3.11 name no buffer
    tell = _COUNT.get()
    done = 0
    while done < len(view):
        count = handle.readinto(view[done : done + _PIECE])  # type: ignore[attr-defined]
        if not count:
            raise WeightsError(f"{path}: the file ends within tensor {claim.name}")
        if claim.crc is not None:
            crc = zlib.crc32(view[done : done + count], crc)
        done += count
        if tell is not None:
            tell(count)
    return crc
