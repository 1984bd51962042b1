"""Sets of labelled images: a folder of class folders, an ``.npz``, and scikit-learn's handwritten digits."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from statewise.images.decode import Pixels, decode_image, image_header, read_image

__all__ = ["ImageSet", "LabelledImages", "load_images"]

Labels: TypeAlias = npt.NDArray[np.int64]

_HELD_OUT = 0.2  # of every class, where the data set has no test part of its own
_SPLIT_SEED = 20_010_911
_TEST_FOLDERS = ("test", "valid", "val")
_FIELDS = ("images", "jpeg", "offsets", "labels")


class LabelledImages(Protocol):
    """Images by number; decoded when asked for."""

    labels: Labels

    def read(self, index: int) -> Pixels:
        """Image ``index`` as ``(H, W, C)`` uint8.

        Raises:
            ValueError: it is damaged.
        """


class ImageSet(NamedTuple):
    """A data set.

    ``channels``: 3, or 1 where all images are gray. ``side``: pixels of a side where all images are squares of one
    size, else ``None``. ``mirrored``: whether a mirrored image is another of its class. ``sha256`` tells data sets
    apart (of a folder: the names and sizes of its files).
    """

    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]
    channels: int
    side: int | None
    mirrored: bool
    sha256: str


def load_images(source: str) -> ImageSet:
    """Open a data set.

    Args:
        source: one of

            * ``"digits"``: scikit-learn's 1,797 handwritten digits of 8×8 pixels (needs ``scikit-learn``);
            * an ``.npz`` with ``train_images`` ``(N, H, W)`` or ``(N, H, W, C)`` of uint8, C 1 or 3, and
              ``train_labels`` ``(N,)`` of integers from 0; or, with files packed one behind the other, ``train_jpeg``
              ``(bytes,)`` of uint8 and ``train_offsets`` ``(N + 1,)`` instead of ``train_images`` (any image format);
              ``test_...`` likewise; ``classes``, the names, if wanted. Other arrays are refused;
            * a folder with one folder of images per class; or with ``train`` and ``test`` (or ``valid`` or ``val``),
              each of which is that. Hidden files are passed over; every other file must be an image.

            Without a test part, a fifth of every class (rounded; at least one image of a class of two) is held out, by
            a permutation that is always the same.

    Raises:
        ValueError: not such a data set; names the file, the array, or the label.
        FileNotFoundError: nothing is there.
        ImportError: an optional package is needed; names the extra.
    """
    if source == "digits":
        return _digits()
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise FileNotFoundError(f"no images at {source}; accepted are 'digits', an .npz file and a folder")
    return _npz(path)


class _Array:
    """``(N, H, W, C)`` in memory."""

    def __init__(self, pixels: Pixels, labels: Labels) -> None:
        self.pixels, self.labels = pixels, labels

    def read(self, index: int) -> Pixels:
        found: Pixels = self.pixels[index]
        return found


class _Packed:
    """Image files one behind the other."""

    def __init__(self, content: Pixels, offsets: Labels, labels: Labels, channels: int, name: str) -> None:
        self.content, self.offsets, self.labels = content, offsets, labels
        self.channels, self.name = channels, name

    def file(self, index: int) -> bytes:
        return self.content[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def read(self, index: int) -> Pixels:
        return decode_image(self.file(index), self.channels, name=f"{self.name}, image {index}")


class _Files:
    """Image files in folders."""

    def __init__(self, paths: Sequence[Path], labels: Labels, channels: int) -> None:
        self.paths, self.labels, self.channels = paths, labels, channels

    def read(self, index: int) -> Pixels:
        try:
            return read_image(self.paths[index], self.channels)
        except OSError as error:  # it was there when the data set was opened
            raise ValueError(f"{self.paths[index]}: cannot be read any more: {error.strerror}") from error


class _Some:
    """Chosen images of another set."""

    def __init__(self, whole: LabelledImages, chosen: Labels) -> None:
        self.whole, self.chosen, self.labels = whole, chosen, whole.labels[chosen]

    def read(self, index: int) -> Pixels:
        return self.whole.read(int(self.chosen[index]))


def _hold_out(whole: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    generator = np.random.default_rng(_SPLIT_SEED)
    held: list[Labels] = []
    for label in np.unique(whole.labels):
        members = generator.permutation(np.flatnonzero(whole.labels == label))
        count = round(len(members) * _HELD_OUT) or int(len(members) > 1)
        held.append(members[:count])
    test = np.sort(np.concatenate(held))
    return _Some(whole, np.setdiff1d(np.arange(len(whole.labels)), test)), _Some(whole, test)


def _finished(
    name: str,
    train: LabelledImages,
    test: LabelledImages | None,
    classes: tuple[str, ...],
    channels: int,
    sizes: set[tuple[int, int]],
    digest: Any,
    *,
    mirrored: bool = True,
) -> ImageSet:
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"{name}: the training images are of {len(np.unique(train.labels))} class; a classifier needs two"
        )
    if test is None:
        train, test = _hold_out(train)
    if not len(test.labels):
        raise ValueError(f"{name}: no test images, and too few to hold some out")
    if sizes and min(min(size) for size in sizes) < 1:
        raise ValueError(f"{name}: holds an image without a pixel")
    one = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    side = one[0] if one[0] == one[1] else None
    return ImageSet(train, test, classes, channels, side, mirrored, digest.hexdigest())


def _digits() -> ImageSet:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError("'digits' are scikit-learn's: pip install 'statewise[images]'") from error
    found = load_digits()
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = found.target.astype(np.int64)
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes())
    whole = _Array(pixels, labels)
    names = tuple(map(str, range(10)))
    return _finished("digits", whole, None, names, 1, {(8, 8)}, digest, mirrored=False)


def _npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array (.npy); an .npz has them by name")
            known = {"classes", *(f"{part}_{field}" for part in ("train", "test") for field in _FIELDS)}
            if other := sorted(set(archive.files) - known):
                raise ValueError(f"array {other[0]!r} is none of {', '.join(sorted(known))}")
            arrays = {name: archive[name] for name in archive.files}
        if "classes" in arrays and arrays["classes"].dtype.kind == "S":
            arrays["classes"] = np.char.decode(arrays["classes"], "utf-8")
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not an .npz of images: {error}") from error
    if "train_labels" not in arrays:
        raise ValueError(f"{path}: array 'train_labels' is missing")
    names = arrays.get("classes")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ValueError(f"{path}: classes has shape {names.shape} and dtype {names.dtype}; accepted is a row of texts")
    parts = [part for part in ("train", "test") if any(name.startswith(f"{part}_") for name in arrays)]
    labels = {part: _npz_labels(path, f"{part}_labels", arrays) for part in parts}
    count = len(names) if names is not None else int(labels["train"].max(initial=-1)) + 1
    for part, given in labels.items():
        if len(wrong := np.flatnonzero((given < 0) | (given >= count))):
            first = int(wrong[0])
            raise ValueError(f"{path}: {part}_labels[{first}] is {given[first]}; accepted are 0..{count - 1}")
    found = {part: _npz_part(path, part, arrays, given) for part, given in labels.items()}
    channels = max(kind for _, kind, _ in found.values())
    sizes = {size for _, _, some in found.values() for size in some}
    if any(kind != channels for images, kind, _ in found.values() if isinstance(images, _Array)):
        raise ValueError(f"{path}: train_images and test_images differ in channels")
    for images, _, _ in found.values():
        if isinstance(images, _Packed):
            images.channels = channels
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    classes = tuple(str(name) for name in (names if names is not None else range(count)))
    test = found["test"][0] if "test" in found else None
    return _finished(str(path), found["train"][0], test, classes, channels, sizes, digest)


def _npz_labels(path: Path, name: str, arrays: dict[str, npt.NDArray[Any]]) -> Labels:
    if name not in arrays:
        raise ValueError(f"{path}: array {name!r} is missing")
    labels = arrays[name]
    if labels.ndim != 1 or labels.dtype.kind not in "ui":
        raise ValueError(
            f"{path}: {name} has shape {labels.shape} and dtype {labels.dtype}; accepted is (N,) of integers"
        )
    return labels.astype(np.int64)


def _npz_part(
    path: Path, part: str, arrays: dict[str, npt.NDArray[Any]], labels: Labels
) -> tuple[LabelledImages, int, set[tuple[int, int]]]:
    """The images, their channels and their sizes."""
    images, packed, offsets = (arrays.get(f"{part}_{field}") for field in ("images", "jpeg", "offsets"))
    if (images is None) == (packed is None) or (packed is None) != (offsets is None):
        raise ValueError(f"{path}: accepted is {part}_images, or {part}_jpeg with {part}_offsets")
    if images is not None:
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4 or images.shape[3] not in (1, 3) or images.dtype != np.uint8:
            raise ValueError(
                f"{path}: {part}_images has shape {arrays[f'{part}_images'].shape} and dtype {images.dtype}; accepted "
                "is (N, H, W) or (N, H, W, C) of uint8, C 1 or 3"
            )
        if len(images) != len(labels):
            raise ValueError(f"{path}: {len(images)} {part}_images, but {len(labels)} {part}_labels")
        return _Array(images, labels), images.shape[3], {(images.shape[1], images.shape[2])}
    assert packed is not None
    assert offsets is not None
    if packed.ndim != 1 or packed.dtype != np.uint8 or offsets.ndim != 1 or offsets.dtype.kind not in "ui":
        raise ValueError(f"{path}: accepted are {part}_jpeg, a row of uint8, and {part}_offsets, a row of integers")
    if len(offsets) != len(labels) + 1:
        raise ValueError(f"{path}: {len(offsets)} {part}_offsets for {len(labels)} {part}_labels; accepted is one more")
    places = offsets.astype(np.int64)
    if places[0] != 0 or places[-1] != len(packed) or (np.diff(places) < 0).any():
        raise ValueError(f"{path}: {part}_offsets must rise from 0 to {len(packed)}, the bytes of {part}_jpeg")
    files = _Packed(packed, places, labels, 3, f"{path}, {part}")
    headers = [image_header(files.file(i), f"{files.name}, image {i}") for i in range(len(labels))]
    kinds = max((kind for _, _, kind in headers), default=1)
    return files, kinds, {(height, width) for height, width, _ in headers}


def _folder(path: Path) -> ImageSet:
    def folders(place: Path) -> list[Path]:
        return sorted(entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    parts = {entry.name: entry for entry in folders(path)}
    held = [name for name in _TEST_FOLDERS if name in parts]
    divided = "train" in parts and len(held) == 1 and len(parts) == 2
    base = parts["train"] if divided else path
    classes = [entry.name for entry in folders(base)]
    if not classes:
        raise ValueError(f"{base}: no folders in it; a folder of images per class is expected")
    train_paths, train_labels = _class_files(base, classes)
    test_paths: list[Path] = []
    test_labels = np.zeros(0, np.int64)
    if divided:
        if foreign := [entry.name for entry in folders(parts[held[0]]) if entry.name not in classes]:
            raise ValueError(f"{parts[held[0]]}: class {foreign[0]!r} is not among those of {base}")
        present = [name for name in classes if (parts[held[0]] / name).is_dir()]
        test_paths, test_labels = _class_files(parts[held[0]], present)
        test_labels = np.asarray([classes.index(name) for name in present], np.int64)[test_labels]
    digest, sizes, channels = hashlib.sha256(), set(), 1
    for file in [*train_paths, *test_paths]:
        height, width, kind = image_header(file, str(file))
        sizes.add((height, width))
        channels = max(channels, kind)
        digest.update(f"{os.fsencode(file.relative_to(path))!r} {file.stat().st_size}\n".encode())
    train = _Files(train_paths, train_labels, channels)
    test = _Files(test_paths, test_labels, channels) if divided else None
    return _finished(str(path), train, test, tuple(classes), channels, sizes, digest)


def _class_files(place: Path, classes: Sequence[str]) -> tuple[list[Path], Labels]:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            file
            for file in (place / name).rglob("*")
            if file.is_file() and not any(piece.startswith(".") for piece in file.relative_to(place).parts)
        )
        if not found:
            raise ValueError(f"{place / name}: no images in it")
        paths += found
        labels += [label] * len(found)
    return paths, np.asarray(labels, np.int64)
