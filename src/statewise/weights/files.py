"""Tensor files, opened with suspicion: what one claims is checked against it before a byte of a tensor is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from statewise.errors import WeightsError
from statewise.files import atomic_write
from statewise.weights.claims import LARGEST_HEADER, Claim, read_claims
from statewise.weights.torch_zip import read_config as read_zip_config
from statewise.weights.torch_zip import read_zip

__all__ = ["open_directory", "read_config", "read_tensors", "write_safetensors"]

_LARGEST_CONFIG = 1 << 22
#: Where a directory keeps its tensors, best first; an index names several files.
_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
)
_SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_directory(directory: Path) -> tuple[dict[str, Any], list[Path]]:
    """``config.json`` parsed (with "Infinity" allowed, as some writers spell it), and the tensor files beside it."""
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise WeightsError(f"{directory}: no config.json in this directory: not a checkpoint")
    config = _parse_json(config_path)
    for name in _NAMES:
        path = directory / name
        if path.is_file():
            return config, _shards(directory, path) if name.endswith(".json") else [path]
    raise WeightsError(f"{directory}: no tensors here (looked for {', '.join(_NAMES)})")


def _shards(directory: Path, index: Path) -> list[Path]:
    """The files an index names: beside it, and nowhere else."""
    where = _parse_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise WeightsError(f"{index}: has no weight_map of tensors to files")
    names = sorted(set(where.values()))
    for name in names:
        if Path(name).name != name or not (directory / name).is_file():
            raise WeightsError(f"{index}: names the file {name!r}, which is not in this directory")
    return [directory / name for name in names]


def _parse_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_CONFIG:
        raise WeightsError(f"{path}: larger than {_LARGEST_CONFIG} bytes")
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def read_tensors(path: Path, dtype: torch.dtype | None = None, *, mapped: bool = False) -> dict[str, Tensor]:
    """Name → tensor, whatever the kind of file; ``dtype`` and ``mapped`` as of :func:`read_claims`.

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
        return read_claims(path, _claim_safetensors(path, start, size), dtype, mapped=mapped)
    if start[:4] == b"PK\x03\x04":
        return read_claims(path, read_zip(path), dtype, mapped=mapped)
    raise WeightsError(f"{path}: neither GGUF nor safetensors nor a zip written by torch.save (starts with {start!r})")


def read_config(path: Path) -> str | Mapping[str, Any] | None:
    """The configuration within a file of tensors that :func:`read_tensors` has read, as text or parsed; or ``None``."""
    return None if path.suffix == ".safetensors" else read_zip_config(path)


def _claim_safetensors(path: Path, start: bytes, size: int) -> list[Claim]:
    if len(start) < 8:
        raise WeightsError(f"{path}: {size} bytes are too few for safetensors")
    (length,) = struct.unpack("<Q", start)
    if length > min(LARGEST_HEADER, size - 8):
        raise WeightsError(f"{path}: claims a header of {length} bytes in a file of {size}")
    with open(path, "rb") as handle:
        handle.seek(8)
        text = handle.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: the header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise WeightsError(f"{path}: the header holds a {type(header).__name__}, expected an object")
    header.pop("__metadata__", None)
    claims = []
    for name, entry in header.items():
        entry = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _SAFETENSORS:
            raise WeightsError(f"{path}: tensor {name} has dtype {dtype!r:.40}; accepted are {', '.join(_SAFETENSORS)}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
            raise WeightsError(f"{path}: tensor {name} has no shape and two offsets: {shape!r:.80}, {offsets!r:.80}")
        begin, end = offsets
        claims.append(Claim(name, _SAFETENSORS[dtype], tuple(shape), 8 + length + begin, end - begin))
    in_order = sorted((claim for claim in claims if claim.size > 0), key=lambda claim: claim.start)
    for before, after in pairwise(in_order):
        if before.start + before.size > after.start:
            raise WeightsError(f"{path}: tensors {before.name} and {after.name} overlap")
    return claims


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


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
