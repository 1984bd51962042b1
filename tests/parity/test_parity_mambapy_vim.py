"""mamba.py's ``vim``: its bidirectional block is our mixer, name for name but one; padding tells them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from statewise.models.mamba import MambaConfig, MambaMixer

_FLOAT32 = 1e-7  # mamba.py makes A and D float32 even in a float64 model

vim: Any = pytest.importorskip("mambapy.vim", reason="mamba.py is not installed: `make parity` installs it")


def pair_of(divide: bool) -> tuple[Any, MambaMixer]:
    theirs = vim.VMambaBlock(vim.MambaConfig(d_model=24, n_layers=1, d_state=5, divide_output=divide)).double()
    ours = MambaMixer(MambaConfig(1, 1, 24, state_size=5), bidirectional=True, divide_out=divide).double()
    weights = {name.replace("A_log_b", "A_b_log"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True)
    return theirs, ours


@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("length", [1, 3, 64])
def test_same_outputs_and_gradients(divide: bool, length: int) -> None:
    theirs, ours = pair_of(divide)
    x = torch.randn(2, length, 24).double().requires_grad_()
    want, (got, state) = theirs(x), ours(x)
    assert state is None
    assert _far(got, want) <= _FLOAT32
    cotangent = torch.randn_like(want)
    named = dict(theirs.named_parameters())
    wanted = torch.autograd.grad(want, [x, *named.values()], cotangent)
    own = dict(ours.named_parameters())
    parameters = [own[name.replace("A_log_b", "A_b_log")] for name in named]
    for name, mine, other in zip(
        ["x", *named], torch.autograd.grad(got, [x, *parameters], cotangent), wanted, strict=True
    ):
        assert _far(mine, other) <= 10 * _FLOAT32, name


@torch.no_grad()
def test_padding_leads_their_backward_scan() -> None:
    theirs, ours = pair_of(True)
    x = torch.randn(1, 20, 24).double()
    padded = torch.cat([x, torch.full((1, 12, 24), 3.0).double()], 1)
    alone = theirs(x)
    assert _far(theirs(padded)[:, :20], alone) > 1e-3
    assert _far(ours(padded, lengths=torch.tensor([20]))[0][:, :20], alone) <= _FLOAT32


def _far(x: Tensor, y: Tensor) -> float:
    return float((x - y).detach().norm() / y.detach().norm().clamp(min=1e-300))
