"""Tensor files, opened with suspicion: limits are checked before torch sees a byte."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewise.errors import WeightsError
from statewise.files import atomic_write

__all__ = ["open_directory", "read_tensors", "write_safetensors"]

_LARGEST_CONFIG = 1 << 24
_LARGEST_HEADER = 1 << 26
_MOST_TENSORS = 100_000
#: Where a directory keeps its tensors, best first.
_NAMES = ("model.safetensors", "pytorch_model.bin", "model.pt", "model.pth")


def open_directory(directory: Path) -> tuple[dict[str, Any], Path]:
    """``config.json`` parsed (with "Infinity" allowed, as some writers spell it), and the tensor file beside it."""
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise WeightsError(f"{directory}: no config.json in this directory: not a checkpoint")
    if config_path.stat().st_size > _LARGEST_CONFIG:
        raise WeightsError(f"{config_path}: larger than {_LARGEST_CONFIG} bytes")
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{config_path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{config_path}: holds a {type(config).__name__}, expected an object")
    for name in _NAMES:
        if (directory / name).is_file():
            return config, directory / name
    raise WeightsError(f"{directory}: no tensors here (looked for {', '.join(_NAMES)})")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name → tensor, whatever the kind of file.

    Raises:
        WeightsError: names the file and what is wrong.
    """
    if path.is_dir():
        raise WeightsError(f"{path}: a directory where a file was expected")
    with open(path, "rb") as handle:
        start = handle.read(8)
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        tensors = _read_safetensors(path, start, size)
    elif start[:4] == b"PK\x03\x04":
        tensors = _read_torch_zip(path)
    else:
        raise WeightsError(f"{path}: neither safetensors nor a zip written by torch.save (starts with {start!r})")
    if not tensors:
        raise WeightsError(f"{path}: holds no tensors")
    return tensors


def _read_safetensors(path: Path, start: bytes, size: int) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if len(start) < 8:
        raise WeightsError(f"{path}: {size} bytes are too few for safetensors")
    (header,) = struct.unpack("<Q", start)
    if header > min(_LARGEST_HEADER, size - 8):
        raise WeightsError(f"{path}: claims a header of {header} bytes in a file of {size}")
    try:
        return dict(load_file(path))
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise WeightsError(f"{path}: {error}") from error


def _read_torch_zip(path: Path) -> dict[str, Tensor]:
    # torch does not hold a storage's claimed size against its record, nor notice damage: the zip itself does both.
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > _MOST_TENSORS:
                raise WeightsError(f"{path}: {len(entries)} zip entries; at most {_MOST_TENSORS} are accepted")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise WeightsError(f"{path}: zip entry {entry.filename!r} is compressed; torch.save stores entries")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise WeightsError(f"{path}: not a readable zip: {error}") from error
    if damaged is not None:
        raise WeightsError(f"{path}: zip entry {damaged!r} is damaged (checksum differs)")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsError(f"{path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    for wrapper in ("model", "state_dict"):
        if isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    size = os.path.getsize(path)
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: entry {name!r} is a {type(tensor).__name__}, expected a tensor")
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > size:
            raise WeightsError(f"{path}: tensor {name} of shape {tuple(tensor.shape)} is larger than the file")
    return dict(loaded)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write in one atomic step; tensors that share memory are written apart."""
    from safetensors.torch import save_file

    # safetensors refuses aliases; a tied head is written under both its names
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        own[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    atomic_write(path, lambda temporary: save_file(own, temporary, metadata={"format": "pt"}))
