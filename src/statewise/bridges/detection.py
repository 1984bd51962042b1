"""Detection and instance masks on our models of images: a pyramid of feature maps in plain torch, and torchvision's
Mask R-CNN on top of it.

All maps of these models have one size, a patch of P pixels a place, while detectors look for objects of each size on a
map of their own. As in ViTDet (Li et al. 2022, arXiv 2203.16527, "simple feature pyramid") the missing sizes are made
by transposed convolution and pooling; here each from a block of its own, the finest from the shallowest. Nothing has to
be compiled: the published detectors on these backbones go through deformable attention, which has a CUDA kernel only.

Legend: B images, C channels.
"""

from __future__ import annotations

import importlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from statewise.models import VisionModel

__all__ = ["FeaturePyramid", "mask_rcnn"]

_SCALES = (4, 2, 1, 0.5)  # sizes of the maps, in that of the backbone's


class FeaturePyramid(nn.Module):
    """Four maps of an image, of 4, 2, 1 and 1/2 times as many rows and columns as there are patches: at 16 pixels a
    patch, every 4, 8, 16 and 32 pixels.

    Args:
        model: a backbone of this package; it becomes a part of this module and loses its classifier.
        indices: the four blocks that the maps are made of, from the finest; ``None`` means the ends of four equal parts
            of the model, as published.
        out_channels: C of every map.

    Raises:
        ValueError: not four indices, or no such block.
    """

    def __init__(self, model: VisionModel, indices: Sequence[int] | None = None, out_channels: int = 256) -> None:
        super().__init__()
        count = model.config.num_layers
        if indices is None:
            indices = [math.ceil(count * part / 4) - 1 for part in (1, 2, 3, 4)]
        if len(indices) != len(_SCALES) or not all(-count <= index < count for index in indices):
            raise ValueError(
                f"indices are {list(indices)!r}; accepted are {len(_SCALES)} numbers of the model's {count} blocks"
            )
        model.reset_classifier(0)
        self.model = model
        self.indices = [index % count for index in indices]
        #: Of every map; torchvision asks.
        self.out_channels = out_channels
        width = model.num_features
        self.resize = nn.ModuleList(_resize(width, scale) for scale in _SCALES)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, out_channels, 1, bias=False),
                _ChannelNorm(out_channels),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                _ChannelNorm(out_channels),
            )
            for _ in _SCALES
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """images ``(B, channels, height, width)`` → maps ``(B, C, rows, columns)`` by names "0" (finest) to "3", and
        "pool", every other place of the last, on which detectors look for the largest objects."""
        # one index may be asked for twice where a model has fewer than four blocks
        blocks = sorted(set(self.indices))
        found = self.model.forward_intermediates(images, blocks, norm=True, intermediates_only=True)
        streams = dict(zip(blocks, found, strict=True))
        maps = OrderedDict(
            (str(level), smooth(resize(streams[index])))
            for level, (index, resize, smooth) in enumerate(zip(self.indices, self.resize, self.smooth, strict=True))
        )
        maps["pool"] = F.max_pool2d(maps[str(len(_SCALES) - 1)], 1, 2)
        return maps


class _ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(B, C, rows, columns)``, at every place by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def _resize(width: int, scale: float) -> nn.Module:
    if scale == 4:
        return nn.Sequential(
            nn.ConvTranspose2d(width, width, 2, 2),
            _ChannelNorm(width),
            nn.GELU(),
            nn.ConvTranspose2d(width, width, 2, 2),
        )
    if scale == 2:
        return nn.ConvTranspose2d(width, width, 2, 2)
    return nn.Identity() if scale == 1 else nn.MaxPool2d(2, 2, ceil_mode=True)


def mask_rcnn(
    model: VisionModel,
    num_classes: int | None,
    *,
    indices: Sequence[int] | None = None,
    out_channels: int = 256,
    **options: Any,
) -> nn.Module:
    """torchvision's Mask R-CNN on the maps of ``model``, to be trained and asked as torchvision documents it.

    Args:
        model: a backbone of this package, which becomes a part of the detector.
        num_classes: with the background, which is class 0; ``None`` if ``box_predictor`` and ``mask_predictor`` are
            given.
        indices, out_channels: see :class:`FeaturePyramid`.
        **options: torchvision's ``MaskRCNN`` takes them: ``min_size``, ``image_mean``, heads of one's own, ... Without
            ``rpn_anchor_generator`` anchors have three shapes, and on each map 8 times the size of a place there.

    Returns:
        a module: in training ``detector(images, targets)`` → dict of losses; in ``eval`` mode ``detector(images)`` →
        for each image ``boxes``, ``labels``, ``scores`` and ``masks``. Images are lists of ``(channels, height,
        width)``.

    Raises:
        ValueError: see :class:`FeaturePyramid`.
        ImportError: torchvision is not installed, or does not fit torch.
    """
    try:
        torchvision = importlib.import_module("torchvision.models.detection")
        anchors = importlib.import_module("torchvision.models.detection.anchor_utils")
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators were compiled for another torch
        raise ImportError(f"needs a torchvision that was built for this torch ({error})") from error
    pyramid = FeaturePyramid(model, indices, out_channels)
    if "rpn_anchor_generator" not in options:
        patch = max(model.config.patch)
        sizes = [(round(8 * patch / scale),) for scale in (*_SCALES, _SCALES[-1] / 2)]
        options["rpn_anchor_generator"] = anchors.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    detector: nn.Module = torchvision.MaskRCNN(pyramid, num_classes, **options)
    return detector
