"""torchvision beside a torch for the CPU, for which its package index has no build.

Such a torchvision stops its own import where it describes two operators that were never compiled, and timm stops with
it. Declared here, they are found. Suppression of overlapping boxes and pooling of regions are also computed here (for
the second torchvision has a way in Python, a hundred times slower); all else that detection needs it has.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


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
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    for name in ("torchvision.ops.poolers", "torchvision.models.detection.roi_heads"):
        user: Any = importlib.import_module(name)
        user.roi_align = _roi_align


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


def _roi_align(
    maps: Tensor, rois: Tensor, output_size: tuple[int, int], spatial_scale: float, sampling_ratio: int = 2
) -> Tensor:
    """Maps ``(B, C, H, W)`` read at the middles of ``sampling_ratio``² parts of every cell of regions ``(K, 5)``, each
    the number of its map and two corners; means of cells ``(K, C, rows, columns)``."""
    sides = torch.tensor(maps.shape[:1:-1])  # W, H
    start, end = (rois[:, 1:3] * spatial_scale, rois[:, 3:5] * spatial_scale)
    size = (end - start).clamp(min=1)
    steps = [(torch.arange(n * sampling_ratio) + 0.5) / (n * sampling_ratio) for n in output_size[::-1]]
    x, y = (start[:, i, None] + size[:, i, None] * steps[i] for i in (0, 1))
    points = torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), -1) * (2 / (sides - 1).clamp(min=1)) - 1
    found = maps.new_empty(len(rois), maps.shape[1], *output_size)
    for image in range(len(maps)):
        mine = rois[:, 0] == image
        read = F.grid_sample(maps[image : image + 1], points[mine].flatten(0, 1)[None], "bilinear", "border", True)
        read = read.unflatten(2, (-1, points.shape[1]))[0].movedim(1, 0)
        found[mine] = F.avg_pool2d(read, sampling_ratio)
    return found
