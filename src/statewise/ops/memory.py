"""Memory for the large outputs of compiled kernels, used again once it is free.

A tensor of megabytes gets new pages from the system, and gives them back when it is dropped; having them zeroed and
mapped again in the next call costs as much as computing an operator. Blocks freed here are kept instead, up to
:data:`MOST_KEPT` bytes, and asked for in large pages where the system has them.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["MOST_KEPT", "empty", "keep_freed_memory", "release"]

#: Bytes of free blocks that are kept at most; the longest unused go first.
MOST_KEPT = 1 << 30

_LARGE = 1 << 20  # bytes from which a block of its own is worth it
_PAGE = 2 << 20  # of a large page

_free: list[mmap.mmap] = []  # a list's own operations are atomic, and this must not lock: tensors die anywhere


class _Lease(ctypes.Structure):
    """Lives as long as the tensor on a block does, and gives the block back."""

    block: mmap.mmap

    def __del__(self) -> None:
        _free.append(self.block)
        while sum(map(len, _free)) > MOST_KEPT:
            del _free[:1]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous CPU tensor with anything in it."""
    count = math.prod(shape)
    size = -(-count * dtype.itemsize // _PAGE) * _PAGE
    if count * dtype.itemsize < _LARGE:
        return torch.empty(shape, dtype=dtype)
    block = _take(size)
    # A view of the whole block through a type of its own, made once a size.
    lease = _lease_type(size).from_buffer(block)
    lease.block = block
    return torch.frombuffer(lease, dtype=dtype, count=count).view(shape)


def release() -> None:
    """Give all free blocks back to the system."""
    _free.clear()


def keep_freed_memory() -> bool:
    """Ask the C library, too, not to return freed memory, so that no tensor of the next training step is paged in anew.

    For a whole process, hence for programs to call, never this library by itself: it then keeps as much memory as it
    once used. Only glibc can be asked.

    Returns:
        whether it was asked.
    """
    if not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    trim_threshold, mmap_threshold, most = -1, -3, 2**30
    return bool(libc.mallopt(mmap_threshold, most) and libc.mallopt(trim_threshold, most))


def _take(size: int) -> mmap.mmap:
    for block in reversed(_free):
        if len(block) == size:
            try:
                _free.remove(block)
            except ValueError:  # another thread was faster
                continue
            return block
    block = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # advice only: a system without large pages says so
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


_lease_types: dict[int, type[_Lease]] = {}


def _lease_type(size: int) -> type[_Lease]:
    if size not in _lease_types:
        _lease_types[size] = type("_Lease", (_Lease,), {"_fields_": [("bytes", ctypes.c_byte * size)]})
    return _lease_types[size]
