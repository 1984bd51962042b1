"""The shift, value by value."""

from __future__ import annotations

import pytest
import torch

from statewise.ops import token_shift, token_shift_step


def test_values() -> None:
    x = torch.arange(1.0, 7.0).view(1, 3, 2)
    y, last = token_shift(x)
    assert y.tolist() == [[[0, 0], [1, 2], [3, 4]]]
    assert last.tolist() == [[5, 6]]
    y, _ = token_shift(x, torch.tensor([[8.0, 9.0]]))
    assert y[0, 0].tolist() == [8, 9]


def test_packed_values() -> None:
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    state = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
    y, last = token_shift(x, state, cu_seqlens=torch.tensor([0, 2, 2, 5, 5]))
    assert y.flatten().tolist() == [10, 1, 30, 3, 4]
    assert last.flatten().tolist() == [2, 20, 5, 40]


def test_padded_values() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [torch.nan] * 3])[..., None].requires_grad_()
    y, last = token_shift(x, torch.tensor([[7.0], [8.0]]), lengths=torch.tensor([2, 0]))
    assert y.flatten().tolist() == [7, 1, 0, 0, 0, 0]
    assert last.flatten().tolist() == [2, 8]
    (y.sum() + last.sum()).backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [1, 1, 0, 0, 0, 0]


def test_dtypes() -> None:
    y, last = token_shift(torch.ones(1, 2, 3, dtype=torch.bfloat16))
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    y, last = token_shift_step(torch.ones(1, 3, dtype=torch.float64))
    assert (y.dtype, last.dtype) == (torch.float64, torch.float64)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"x has shape \(2, 3\); accepted is \(B, T, C\)"):
        token_shift(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"state has shape \(1, 3\); accepted is \(2, 3\)"):
        token_shift(torch.zeros(2, 4, 3), torch.zeros(1, 3))
