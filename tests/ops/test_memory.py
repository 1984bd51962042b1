"""Blocks of large outputs: used again when free, never while anything looks at them, and not kept without end."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from statewise.ops import memory

LARGE = (1 << 20,)  # numbers: 4 MiB of float32


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    gc.collect()
    memory.release()
    yield
    memory.release()


def free_bytes() -> int:
    return sum(map(len, memory._free))


def test_small_tensors_are_torchs_own() -> None:
    x = memory.empty((3, 5), torch.float64)
    assert x.shape == (3, 5)
    assert x.dtype == torch.float64
    del x
    assert free_bytes() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_freed_block_is_used_again(dtype: torch.dtype) -> None:
    x = memory.empty(LARGE, dtype)
    assert x.is_contiguous()
    assert x.shape == LARGE
    assert x.dtype == dtype
    address = x.data_ptr()
    del x
    assert free_bytes() == LARGE[0] * dtype.itemsize
    y = memory.empty(LARGE, dtype)
    assert y.data_ptr() == address
    assert free_bytes() == 0


def test_a_view_keeps_its_block() -> None:
    x = memory.empty(LARGE, torch.float32).fill_(1.0)
    view = x.view(1024, 1024)[3:5].t()
    del x
    y = memory.empty(LARGE, torch.float32).fill_(2.0)
    assert (view == 1.0).all()
    assert (y == 2.0).all()
    del view
    assert free_bytes() == 4 * LARGE[0]


def test_what_autograd_saved_keeps_its_block() -> None:
    x = memory.empty(LARGE, torch.float32).fill_(3.0).requires_grad_()
    total = (x * x).sum()
    del x
    memory.empty(LARGE, torch.float32).fill_(-1.0)
    total.backward()
    assert total.item() == 9.0 * LARGE[0]


def test_the_longest_unused_go_first_when_too_many_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_KEPT", 8 << 20)
    tensors = [memory.empty((size << 18,), torch.float32) for size in (4, 2, 6)]
    while tensors:
        tensors.pop(0)
    assert [len(block) >> 20 for block in memory._free] == [2, 6]


def test_no_size_is_lost_to_rounding() -> None:
    x = memory.empty(((1 << 20) + 1,), torch.float32)
    x.fill_(1.0)
    assert x.sum().item() == pytest.approx((1 << 20) + 1)
