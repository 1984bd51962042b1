"""Tiny models of each kind, stirred so that what a state holds reaches the logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import statewise
from statewise.inference import stir

SIZES = {"vocab_size": 257, "num_layers": 2, "width": 64}
NAMES = ("rwkv4", "rwkv7", "mamba")


def _tiny(name: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(1)
    model = statewise.create(name, **SIZES).to(dtype)
    stir(model, scale=0.3)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., torch.nn.Module]:
    """``tiny(name, dtype=torch.float64)``: a new model."""
    return _tiny


@pytest.fixture(scope="session", params=NAMES)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """One of each kind, float64. Tests must leave it as it is."""
    return _tiny(request.param)


@pytest.fixture(scope="session")
def rwkv4() -> torch.nn.Module:
    """The quickest of them, for tests that are about the code around a model."""
    return _tiny("rwkv4")
