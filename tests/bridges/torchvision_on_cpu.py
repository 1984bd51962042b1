"""torchvision beside a torch for the CPU, for which its package index has no build.

Such a torchvision stops its own import where it describes two operators that were never compiled, and timm stops with
it. Declared here, they are found; suppression of overlapping boxes is also computed here. Whatever else detection needs
torchvision has in Python.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor


def need(package: str) -> Any:
    """Import ``package``, which itself needs torchvision; skip where one of the two is not installed."""
    for name in ("torchvision", package):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
    if not hasattr(torch.ops.torchvision, "nms"):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:
            _declare()
    return importlib.import_module(package)


def _declare() -> None:
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.impl("torchvision::nms", "CPU")(_nms)
    extension = importlib.import_module("torchvision.ops.boxes")
    extension._assert_has_ops = lambda: None  # type: ignore[attr-defined]


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Boxes ``(n, 4)`` that overlap no box of a higher score by more than the threshold, best first."""
    top, bottom = dets[:, None, :2], dets[:, None, 2:]
    shared = (torch.minimum(bottom, dets[:, 2:]) - torch.maximum(top, dets[:, :2])).clamp(min=0).prod(2)
    area = (dets[:, 2:] - dets[:, :2]).prod(1)
    overlaps = shared / (area[:, None] + area - shared) > iou_threshold
    kept: list[int] = []
    gone = torch.zeros(len(dets), dtype=torch.bool)
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not gone[index]:
            kept.append(index)
            gone |= overlaps[index]
    return torch.tensor(kept, dtype=torch.int64)
