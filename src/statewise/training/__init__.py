"""Training: the loss, the recipe, the loop, and snapshots from which a run continues bit for bit.

Names are resolved on first use: reading a configuration does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ClassifierResult": "classify",
    "DivergenceError": "loop",
    "ImageTrainConfig": "image_config",
    "RunResult": "loop",
    "TrainConfig": "config",
    "language_model_loss": "loss",
    "latest_snapshot": "snapshot",
    "train": "loop",
    "train_classifier": "classify",
}

__all__ = [
    "ClassifierResult",
    "DivergenceError",
    "ImageTrainConfig",
    "RunResult",
    "TrainConfig",
    "language_model_loss",
    "latest_snapshot",
    "train",
    "train_classifier",
]

if TYPE_CHECKING:
    from statewise.training.classify import ClassifierResult, train_classifier
    from statewise.training.config import TrainConfig
    from statewise.training.image_config import ImageTrainConfig
    from statewise.training.loop import DivergenceError, RunResult, train
    from statewise.training.loss import language_model_loss
    from statewise.training.snapshot import latest_snapshot


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statewise.training' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"statewise.training.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
