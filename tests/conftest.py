"""Shared fixtures. Data outside the repository may be absent: a test that needs it skips and says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

# The same examples on every run, so that a red run is the change's own; `make fuzz` explores others.
settings.register_profile("settled", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("settled")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files, data and small trained weights that lies beside a checkout."""
    if not SHARED.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return SHARED


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(20261121)
