"""What is done to an image before a model sees it; all of it a function of the arguments, randomness included."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from statewise.images.decode import Pixels, pillow

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["augment", "fit_image"]

_SMALLEST_PART = 0.35  # of the area, in a resized crop
_LARGEST_STRETCH = 4 / 3


def fit_image(image: Pixels, size: int) -> Pixels:
    """The image as a square of ``size`` pixels: its shorter side resized to that, the middle cut out.

    An image of that size already is returned as it is. Resizing is bicubic, with antialiasing.

    Args:
        image: ``(H, W, C)`` uint8, C 1 or 3; at least one pixel.
        size: from 1.
    """
    height, width = _sides(image)
    if (height, width) == (size, size):
        return image
    scale = size / min(height, width)
    wanted = (max(size, round(height * scale)), max(size, round(width * scale)))
    # Only what the middle is made of is resized: a panorama would otherwise grow to any size.
    tall, wide = size * height / wanted[0], size * width / wanted[1]
    top, left = (height - tall) / 2, (width - wide) / 2
    return _resized(image, (top, left, top + tall, left + wide), size)


def augment(
    image: Pixels, size: int, generator: np.random.Generator, *, crop: str, flip: bool, turn: float = 0.0
) -> Pixels:
    """A random view of the image, ``size`` pixels square.

    Args:
        image: ``(H, W, C)`` uint8.
        size: from 1.
        generator: draws everything that is random here; a generator in the same state gives the same view.
        crop: ``"none"``: the image fitted as by :func:`fit_image`. ``"shift"``: that, moved by up to an eighth of
            ``size`` (at least a pixel) each way, its border repeated. ``"resized"``: 35 to 100 % of the area, of sides
            in proportions between 3:4 and 4:3, resized.
        flip: whether left and right are exchanged half of the time.
        turn: the view is turned by up to this many degrees either way, and magnified or shrunk by up to a hundredth for
            each of them, about its middle; what comes in from outside is black.

    Raises:
        ValueError: another crop.
    """
    if crop == "resized":
        view = _resized(image, _part(image, generator), size)
    elif crop == "shift":
        view = fit_image(image, size)
        reach = max(1, size // 8)
        down, right = generator.integers(0, 2 * reach + 1, 2)
        padded = np.pad(view, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
        view = padded[down : down + size, right : right + size]
    elif crop == "none":
        view = fit_image(image, size)
    else:
        raise ValueError(f"crop is {crop!r}; accepted are 'none', 'shift' and 'resized'")
    if flip and generator.random() < 0.5:
        view = view[:, ::-1]
    return _turned(view, turn, generator) if turn else view


def _sides(image: Pixels) -> tuple[int, int]:
    if image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"image has shape {image.shape}; accepted is (H, W, C), C 1 or 3, with at least one pixel")
    return image.shape[0], image.shape[1]


def _part(image: Pixels, generator: np.random.Generator) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of a random part."""
    height, width = _sides(image)
    area = height * width * generator.uniform(_SMALLEST_PART, 1.0)
    stretch = math.exp(generator.uniform(-math.log(_LARGEST_STRETCH), math.log(_LARGEST_STRETCH)))
    tall, wide = min(height, math.sqrt(area / stretch)), min(width, math.sqrt(area * stretch))
    top, left = generator.uniform(0, height - tall), generator.uniform(0, width - wide)
    return top, left, top + tall, left + wide


def _turned(view: Pixels, turn: float, generator: np.random.Generator) -> Pixels:
    module = pillow()
    angle = math.radians(generator.uniform(-turn, turn))
    zoom = math.exp(generator.uniform(-turn, turn) / 100)
    across, up = math.cos(angle) / zoom, math.sin(angle) / zoom
    middle = view.shape[0] / 2
    matrix = (across, -up, middle - middle * (across - up), up, across, middle - middle * (up + across))
    picture = _picture(view)
    plain = np.asarray(picture.transform(picture.size, module.Transform.AFFINE, matrix, module.Resampling.BILINEAR))
    return plain.reshape(view.shape)


def _picture(image: Pixels) -> Image.Image:
    found: Image.Image = pillow().fromarray(np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image))
    return found


def _resized(image: Pixels, box: tuple[float, float, float, float], size: int) -> Pixels:
    module = pillow()
    top, left, bottom, right = box
    inside = (max(0.0, left), max(0.0, top), min(float(image.shape[1]), right), min(float(image.shape[0]), bottom))
    plain = np.asarray(_picture(image).resize((size, size), module.Resampling.BICUBIC, box=inside))
    return plain.reshape(size, size, image.shape[2])
