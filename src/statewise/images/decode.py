"""Image files as arrays."""

from __future__ import annotations

import io
import os
import struct
import warnings
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Pixels", "decode_image", "image_header", "pillow", "read_image"]

Pixels: TypeAlias = npt.NDArray[np.uint8]

# What Pillow raises for files that are not what they say.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError, OverflowError, MemoryError),
    *(RuntimeError, struct.error),
)
_GRAY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        ImportError: Pillow is not installed; names the extra.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("images are read with Pillow: pip install 'statewise[images]'") from error
    return Image


def read_image(path: str | os.PathLike[str], channels: int = 3) -> Pixels:
    """The image in a file, any format that Pillow knows, turned as its EXIF orientation says.

    Args:
        path: the file.
        channels: 3: colour as RGB, gray repeated; 1: luminance. Transparent pixels are shown on black; 16-bit gray is
            cut to its upper byte.

    Returns:
        ``(H, W, channels)`` uint8.

    Raises:
        ValueError: no image, a damaged one, or one of so many pixels that Pillow suspects an attack (178,956,970).
        FileNotFoundError: no such file.
    """
    with open(path, "rb") as handle:
        return decode_image(handle.read(), channels, name=os.fspath(path))


def decode_image(content: bytes, channels: int = 3, *, name: str = "image") -> Pixels:
    """As :func:`read_image`, of a file's bytes; ``name`` is for messages.

    Raises:
        ValueError: as there, or another number of channels.
    """
    if channels not in (1, 3):
        raise ValueError(f"channels is {channels!r}; accepted are 1 (gray) and 3 (RGB)")
    with _opened(content, name) as image:
        from PIL import ImageOps

        try:
            image.load()
            whole = ImageOps.exif_transpose(image)
            return _pixels(whole, channels)
        except _DAMAGE as error:
            raise ValueError(f"{name}: a damaged image: {error}") from error


def image_header(content: bytes | str | os.PathLike[str], name: str) -> tuple[int, int, int]:
    """Height, width and channels (1 or 3) of an image, from its first bytes alone.

    Args:
        content: a path, or a file's bytes.
        name: for messages.

    Raises:
        ValueError: no image.
        OSError: the file cannot be read.
    """
    with _opened(content, name) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(0x0112, 1)
        except _DAMAGE as error:
            raise ValueError(f"{name}: a damaged image: {error}") from error
        if turned in (5, 6, 7, 8):  # lies on its side
            width, height = height, width
        return height, width, 1 if image.mode in _GRAY else 3


def _opened(content: bytes | str | os.PathLike[str], name: str) -> Image.Image:
    module = pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", module.DecompressionBombWarning)  # large is allowed; suspect is an error
            image: Image.Image = module.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except module.UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image of a known format") from error
    except (module.DecompressionBombError, *_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file, not of what is in it
            raise
        raise ValueError(f"{name}: not an image that can be read: {error}") from error
    return image


def _pixels(image: Image.Image, channels: int) -> Pixels:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image).astype(np.float64)
        # 16 bits in all formats that come as "I"; Pillow's own conversion would cut all above 255 to white.
        narrow = np.clip(wide / 257 if image.mode != "F" else wide, 0, 255).round().astype(np.uint8)
        found = narrow[:, :, None]
        return np.repeat(found, channels, 2)
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = pillow().new("RGBA", image.size, (0, 0, 0, 255))
        image = pillow().alpha_composite(ground, image)
    plain = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return plain.reshape(plain.shape[0], plain.shape[1], channels)
