"""How pixels become what one model reads, and what its classes are called: kept beside its weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from statewise.images.datasets import LabelledImages
from statewise.images.decode import Pixels
from statewise.images.transforms import fit_image

__all__ = ["FILE", "Preprocessing", "measure_channels", "read_preprocessing"]

#: Name of the file, in the directory of a checkpoint.
FILE = "images.json"

_LARGEST = 16384  # a file must not be able to ask for all memory
_MEASURED = 2048
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Squares of ``image_size`` pixels, ``channels`` 1 or 3; values from 0 to 1, less ``mean``, over ``std`` (one for
    each channel). ``classes`` are names, the first that of class 0 (none: they are numbers).

    Raises:
        ValueError: a value outside its range; names it.
    """

    image_size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or not 1 <= self.image_size <= _LARGEST:
            raise ValueError(f"image_size is {self.image_size!r}; accepted are integers from 1 to {_LARGEST}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels!r}; accepted are 1 and 3")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            numbers = isinstance(values, (tuple, list)) and all(
                isinstance(value, (int, float)) and math.isfinite(value) and value > least for value in values
            )
            if not numbers or len(values) != self.channels:
                raise ValueError(f"{name} is {values!r}; accepted are {self.channels} numbers, deviations above 0")
            object.__setattr__(self, name, tuple(map(float, values)))
        if not isinstance(self.classes, (tuple, list)) or not all(isinstance(name, str) for name in self.classes):
            raise ValueError(f"classes is {self.classes!r}; accepted is a row of names")
        object.__setattr__(self, "classes", tuple(self.classes))

    @classmethod
    def of_imagenet(cls, image_size: int) -> Preprocessing:
        """What models published for ImageNet read; classes without names."""
        return cls(image_size, 3, _IMAGENET_MEAN, _IMAGENET_STD)

    def __call__(self, images: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Images ``(H, W, channels)`` uint8 of any sizes, fitted and normalised → ``(B, channels, S, S)``."""
        stacked = np.stack([fit_image(image, self.image_size) for image in images]).astype(np.float32)
        whole = (stacked / np.float32(255) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(whole.transpose(0, 3, 1, 2))

    def name(self, label: int) -> str:
        """Of a class; its number where it has none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def to_json(self) -> str:
        """The text :func:`read_preprocessing` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_preprocessing(directory: str | os.PathLike[str]) -> Preprocessing | None:
    """What ``images.json`` in a checkpoint's directory says; ``None`` where there is no such file.

    Raises:
        ValueError: a file that is not of this form; names it.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return Preprocessing(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def measure_channels(images: LabelledImages, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, values from 0 to 1, over up to 2,048 images evenly taken and fitted to
    ``size``. A channel that is always the same gets deviation 1."""
    count = len(images.labels)
    chosen = range(count) if count <= _MEASURED else [index * count // _MEASURED for index in range(_MEASURED)]
    number, first, second = 0, np.zeros(1), np.zeros(1)
    for index in chosen:
        values = fit_image(images.read(index), size).reshape(size * size, -1) / 255.0
        number, first, second = number + len(values), first + values.sum(0), second + np.square(values).sum(0)
    mean = first / number
    std = np.sqrt(np.maximum(second / number - mean**2, 0))
    return tuple(map(float, mean)), tuple(float(value) if value > 1e-3 else 1.0 for value in std)
