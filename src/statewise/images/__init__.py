"""Image data: sets of labelled images, decoding, and what is done to an image before a model sees it.

Nothing here imports torch; names are resolved on first use. Images are arrays ``(H, W, C)`` of uint8, C being 1 or 3.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "ImageSet": "datasets",
    "LabelledImages": "datasets",
    "Preprocessing": "preprocessing",
    "augment": "transforms",
    "decode_image": "decode",
    "fit_image": "transforms",
    "load_images": "datasets",
    "measure_channels": "preprocessing",
    "read_image": "decode",
    "read_preprocessing": "preprocessing",
}

__all__ = [
    "ImageSet",
    "LabelledImages",
    "Preprocessing",
    "augment",
    "decode_image",
    "fit_image",
    "load_images",
    "measure_channels",
    "read_image",
    "read_preprocessing",
]

if TYPE_CHECKING:
    from statewise.images.datasets import ImageSet, LabelledImages, load_images
    from statewise.images.decode import decode_image, read_image
    from statewise.images.preprocessing import Preprocessing, measure_channels, read_preprocessing
    from statewise.images.transforms import augment, fit_image


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'statewise.images' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"statewise.images.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
