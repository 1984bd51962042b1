"""Files of ``torch.save``: a zip of raw records and one pickle that says how they make tensors.

The pickle is read by the few opcodes that torch writes: numbers, names, dictionaries, and the two functions of torch
that describe a tensor. Nothing that a file names is ever looked up or called; neither Python's nor torch's loader sees
it.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from statewise.errors import WeightsError
from statewise.weights.claims import Claim

__all__ = ["read_config", "read_zip"]

_MOST_ENTRIES = 100_000
_LARGEST_PICKLE = 1 << 20  # bytes: some 7,000 tensors
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, then lengths of name and extra field


class _Record(NamedTuple):
    """A storage."""

    key: str
    dtype: torch.dtype
    numel: int


class _Described(NamedTuple):
    """A tensor that the pickle describes."""

    record: _Record
    offset: int
    shape: tuple[int, ...]


class _Refused(Exception):
    """Something in the pickle that is not accepted; the message says what."""


def _rebuild_tensor(*arguments: Any) -> _Described:
    if len(arguments) not in (6, 7) or not isinstance(arguments[0], _Record):
        raise _Refused("a tensor that is described in no known way")
    record, offset, shape, strides = arguments[:4]
    axes = (shape, strides)
    if not all(isinstance(part, tuple) and all(type(n) is int and 0 <= n < 1 << 62 for n in part) for part in axes):
        raise _Refused(f"a tensor of shape {shape!r} and strides {strides!r}")
    if len(shape) != len(strides):
        raise _Refused(f"a tensor of shape {shape} with {len(strides)} strides")
    count, step = math.prod(shape), 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if count and size != 1 and stride != step:
            raise _Refused(f"a tensor of shape {shape} whose strides {strides} are not contiguous")
        step *= size
    if type(offset) is not int or not 0 <= offset <= record.numel - count:
        raise _Refused(f"a tensor of shape {shape} at {offset!r} of a storage of {record.numel}")
    return _Described(record, offset, shape)


def _rebuild_parameter(*arguments: Any) -> _Described:
    if not arguments or not isinstance(arguments[0], _Described):
        raise _Refused("a parameter that is described in no known way")
    return arguments[0]


_KNOWN: dict[str, Any] = {
    "collections OrderedDict": lambda: {},
    "yacs.config CfgNode": lambda: {},  # a configuration, which is a dictionary
    "argparse Namespace": lambda: {},  # the options of a training script, beside the weights; left empty
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    **{f"torch {name}": dtype for name, dtype in _STORAGES.items()},
}


def _record(pid: Any) -> _Record:
    if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
        raise _Refused("a reference to what is no storage")
    _, dtype, key, _, count = pid
    if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise _Refused("a storage that is described in no known way")
    return _Record(key, dtype, count)


def _evaluate(content: bytes) -> Any:
    """The object that a pickle describes, tensors as descriptions."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # what lay on the stack when a mark was set
    memo: dict[Any, Any] = {}

    def fill(target: Any, items: list[Any]) -> None:
        # numbers: what optimisers keep beside the weights; a tensor's name is checked where it is read
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in items[::2]):
            raise _Refused("a dictionary whose keys are no names")
        target.update(zip(items[::2], items[1::2], strict=True))

    for opcode, argument, _ in pickletools.genops(content):
        match opcode.name:
            case "PROTO":
                pass
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                below.append(stack)
                stack = []
            case "TUPLE":
                stack = [*below.pop(), tuple(stack)]
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "GLOBAL":
                if argument not in _KNOWN:
                    raise _Refused(f"{argument!r:.80}: nothing but tensors is accepted")
                stack.append(_KNOWN[argument])
            case "BINPERSID":
                stack[-1] = _record(stack[-1])
            case "REDUCE" | "NEWOBJ":
                given, function = stack.pop(), stack.pop()
                if not callable(function) or not isinstance(given, tuple):
                    raise _Refused("a call of what is no function")
                stack.append(function(*given))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                fill(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, below.pop()
                fill(stack[-1], items)
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                items, stack = stack, below.pop()
                stack[-1].extend(items)
            case "BUILD":
                stack.pop()  # what a state dict carries beside its items
                if not isinstance(stack[-1], dict):
                    raise _Refused("an object with a state of its own")
            case "STOP":
                return stack.pop()
            case name:
                raise _Refused(f"opcode {name}, which torch.save does not write")
    raise _Refused("no end")


def read_zip(path: Path) -> list[Claim]:
    """What the file claims to hold.

    Raises:
        WeightsError: not such a file, or one that holds anything but tensors.
    """
    entries, prefix, content, order = _open(path)
    if order != b"little":
        raise WeightsError(f"{path}: written on a big-endian machine; little-endian files are accepted")
    with open(path, "rb") as handle:
        starts = {name: _start(path, handle, entry) for name, entry in entries.items() if name.startswith(prefix)}
    claims = []
    for name, described in _tensors(path, content).items():
        record = described.record
        entry = entries.get(f"{prefix}data/{record.key}")
        if entry is None:
            raise WeightsError(f"{path}: tensor {name} lies in record {record.key!r}, which is missing")
        itemsize = record.dtype.itemsize
        if entry.file_size != record.numel * itemsize:
            raise WeightsError(
                f"{path}: tensor {name} needs a record of {record.numel * itemsize} bytes; {record.key!r} has "
                f"{entry.file_size}"
            )
        count = math.prod(described.shape)
        whole = count == record.numel
        claims.append(
            Claim(
                name,
                record.dtype,
                described.shape,
                starts[entry.filename] + described.offset * itemsize,
                count * itemsize,
                crc=entry.CRC if whole else None,
            )
        )
    return claims


def read_config(path: Path) -> str | Mapping[str, Any] | None:
    """The configuration that trainers put beside weights: OpenMMLab's is text, yacs' a dictionary; or ``None``.

    Raises:
        WeightsError: as :func:`read_zip`.
    """
    loaded = _load(path, _open(path)[2])
    if not isinstance(loaded, Mapping):
        return None
    for holder in (loaded.get("meta"), loaded):
        config = holder.get("config") if isinstance(holder, Mapping) else None
        if isinstance(config, str | Mapping):
            return config
    return None


def _open(path: Path) -> tuple[dict[str, zipfile.ZipInfo], str, bytes, bytes]:
    """A file's entries, the folder they are in, its pickle, and how it says that bytes are ordered."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in _entries(path, archive)}
            mains = [name for name in entries if name.endswith("/data.pkl")]
            if len(mains) != 1:
                raise WeightsError(f"{path}: a zip with {len(mains)} files data.pkl; torch.save writes one")
            main = mains[0]
            prefix = main[: -len("data.pkl")]
            content = archive.read(main)
            order = archive.read(prefix + "byteorder") if prefix + "byteorder" in entries else b"little"
    except WeightsError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise WeightsError(f"{path}: not a readable zip of torch.save: {error}") from error
    return entries, prefix, content, order


def _entries(path: Path, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    if len(entries) > _MOST_ENTRIES:
        raise WeightsError(f"{path}: {len(entries)} zip entries; at most {_MOST_ENTRIES} are accepted")
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
            raise WeightsError(f"{path}: zip entry {entry.filename!r} is compressed; torch.save stores entries")
        if entry.filename.endswith(("/data.pkl", "/byteorder")) and entry.file_size > _LARGEST_PICKLE:
            raise WeightsError(
                f"{path}: {entry.filename} has {entry.file_size} bytes; at most {_LARGEST_PICKLE} are read"
            )
    return entries


def _start(path: Path, handle: io.BufferedReader, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: its local header has a name and an extra field of its own."""
    handle.seek(entry.header_offset)
    header = handle.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
        raise WeightsError(f"{path}: zip entry {entry.filename!r} has no header where the directory says")
    _, name, extra = _LOCAL_HEADER.unpack(header)
    return int(entry.header_offset + _LOCAL_HEADER.size + name + extra)


def _load(path: Path, content: bytes) -> Any:
    try:
        return _evaluate(content)
    except _Refused as error:
        raise WeightsError(f"{path}: the pickle holds {error}") from error
    except Exception as error:  # a damaged pickle raises whatever its damage leads to
        raise WeightsError(f"{path}: the pickle is damaged: {error}") from error


def _tensors(path: Path, content: bytes) -> dict[str, _Described]:
    loaded = _load(path, content)
    for wrapper in ("model", "state_dict", "model_ema"):  # the averaged weights where there are no others
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, expected a dictionary of tensors")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, _Described):
            raise WeightsError(f"{path}: entry {name!r:.80} is a {type(tensor).__name__}, expected a tensor")
    return dict(loaded)
