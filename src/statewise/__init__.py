"""Statewise: recurrent sequence models with a linear state.

Names are resolved on first use, so ``import statewise`` alone does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "create": "models",
    "load": "models",
    "save": "models",
    "list_models": "models",
    "generate": "inference",
    "backends": "ops",
    "WeightsError": "errors",
    "StateError": "errors",
    "SnapshotError": "errors",
}
_MODULES = ("errors", "files", "inference", "models", "ops", "state", "testing", "text", "training", "weights")

__all__ = [
    "SnapshotError",
    "StateError",
    "WeightsError",
    "__version__",
    "backends",
    "create",
    "generate",
    "list_models",
    "load",
    "save",
]

if TYPE_CHECKING:
    from statewise.errors import SnapshotError, StateError, WeightsError
    from statewise.inference import generate
    from statewise.models import create, list_models, load, save
    from statewise.ops import backends


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"statewise.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"statewise.{name}")
    else:
        raise AttributeError(f"module 'statewise' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})
