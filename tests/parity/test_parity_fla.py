"""fla-core's reference recurrences and our operators, live, from a state and to one: theirs is laid out as ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from statewise.ops import wkv6, wkv7

pytest.importorskip("fla", reason="fla-core is not installed: `make parity` installs it")

LIMIT = 2e-5
B, T, H, K, V = 2, 19, 3, 8, 5  # K and V differ: a transposed state could not pass


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= LIMIT * max(1.0, float(want.abs().max()))


def by_head(*tensors: torch.Tensor) -> Any:
    return (tensor.transpose(1, 2) for tensor in tensors)


def test_wkv7_continues_from_their_state_and_they_from_ours() -> None:
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    torch.manual_seed(0)
    r, k, direction = torch.randn(3, B, T, H, K)
    v, begin = torch.randn(B, T, H, V), torch.randn(B, H, K, V)
    log_w, rate = -0.6 * torch.rand(B, T, H, K), torch.rand(B, T, H, K)
    direction = torch.nn.functional.normalize(direction, dim=-1)
    y, state = wkv7(r, log_w, k, v, -direction, direction * rate, begin)
    theirs = by_head(r * K**0.5, k, v, -direction, direction * rate, log_w)  # theirs scales r by 1/sqrt(K)
    want, end = dplr_recurrence(*theirs, initial_state=begin)
    close(y, want.transpose(1, 2))
    close(state, end)


def test_wkv6_continues_from_their_state_and_they_from_ours() -> None:
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    torch.manual_seed(1)
    r, k, decay = torch.randn(3, B, T, H, K)
    v, begin, u = torch.randn(B, T, H, V), torch.randn(B, H, K, V), torch.randn(H, K)
    log_w = -torch.exp(decay - 2)
    y, state = wkv6(r, log_w, k, v, u, begin)
    want, end = naive_recurrent_rwkv6(
        *by_head(r, k, v, log_w), u, scale=1.0, initial_state=begin, output_final_state=True
    )
    close(y, want.transpose(1, 2))
    close(state, end)
