"""Shared fixtures. Data outside the repository may be absent: a test that needs it skips and says so."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# The same examples on every run, so that a red run is the change's own; `make fuzz` explores others.
settings.register_profile("settled", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("settled")

# Without a GPU, Triton kernels run in Triton's interpreter; it has to be asked for before any of them is imported.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _patch_the_language_once_a_launch() -> None:
    """The interpreter patches triton.language anew whenever one device function calls another: half of its time."""
    import triton.language
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    seen: set[frozenset[str]] = set()

    def patch_once(function: Any) -> Any:
        modules = (triton.language, triton.language.core)
        names = frozenset(x.__name__ for x in function.__globals__.values() if any(x is one for one in modules))
        if names in seen:
            return None
        seen.add(names)
        return patch(function)

    def launch(*arguments: Any, **options: Any) -> Any:
        seen.clear()
        return run(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


if os.environ.get("TRITON_INTERPRET") == "1":
    _patch_the_language_once_a_launch()

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
