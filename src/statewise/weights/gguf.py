"""GGUF files, versions 2 and 3: the container that llama.cpp reads; what its tensors mean is ``gguf_names``'.

A file is a header (magic, version, how many tensors, how many pairs), pairs of a key and a typed value, a description
of each tensor (name, axes innermost first, type, offset), and from the next multiple of the alignment on the tensors
themselves. Every length is held against the file before it is used; values that nobody asks for (tokenizers, licences)
are stepped over and never kept. Everything is little-endian; big-endian files exist and are refused.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from statewise.errors import WeightsError
from statewise.weights.claims import Blocks, Claim, read_claims

__all__ = ["Value", "detect", "read_gguf", "write_gguf"]

#: A metadata value: ``None`` stands for an array or a text that was stepped over.
Value = str | bool | int | float | None

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # where a file does not say otherwise
_ALIGNMENTS = tuple(1 << n for n in range(3, 17))
_MOST_PAIRS = 1 << 14
_MOST_TENSORS = 1 << 14
_MOST_ITEMS = 1 << 19  # strings and arrays within arrays, of which each has to be walked over
_DEEPEST = 4  # arrays in arrays
_LARGEST = 1 << 26  # bytes before the tensors; vocabularies of today take 20 MB
_PIECE = 1 << 20
_LENGTH = struct.Struct("<Q")
_LONGEST_KEY = 1 << 10
_LONGEST_NAME = 64  # llama.cpp's own limit
_LONGEST_TEXT = 1 << 16
_MOST_AXES = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
#: Texts that anyone asks for; all others are stepped over.
_KEPT = ("general.architecture", "statewise.config")
#: Types by their numbers in ggml.h, to refuse by name.
_REFUSED = {
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


def _decode_q8_0(raw: Tensor, values: Tensor) -> None:
    """A block is a float16 scale and 32 signed bytes: value = scale · byte."""
    torch.mul(raw[:, 2:].view(torch.int8), raw.view(torch.float16)[:, :1].float(), out=values)


def _decode_q4_0(raw: Tensor, values: Tensor) -> None:
    """A block is a float16 scale and 16 bytes, whose low halves are values 0..15 and whose high halves are 16..31:
    value = scale · (half - 8)."""
    halves = torch.cat([raw[:, 2:] & 15, raw[:, 2:] >> 4], 1).view(torch.int8) - 8
    torch.mul(halves, raw.view(torch.float16)[:, :1].float(), out=values)


class _Type(NamedTuple):
    """A type of tensors: what it is called, what is made of it, and from which blocks."""

    name: str
    dtype: torch.dtype
    blocks: Blocks | None = None


_TYPES = {
    0: _Type("F32", torch.float32),
    1: _Type("F16", torch.float16),
    30: _Type("BF16", torch.bfloat16),
    2: _Type("Q4_0", torch.float32, Blocks(32, 18, _decode_q4_0)),
    8: _Type("Q8_0", torch.float32, Blocks(32, 34, _decode_q8_0)),
}
_WRITTEN = {kind.dtype: number for number, kind in _TYPES.items() if kind.blocks is None}


def detect(path: Path) -> bool:
    """Whether this file begins as a GGUF does."""
    with open(path, "rb") as handle:
        return handle.read(4) == _MAGIC


def read_gguf(path: Path) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Metadata and tensors by the file's own names.

    F32, F16 and BF16 come as they are. Q8_0 and Q4_0 become float32, where scale times integer is exact, some
    blocks at a time: memory holds the results alone. Axes come outermost first.

    Returns:
        metadata (arrays and most texts, such as tokenizers and licences, as ``None``) and tensors.

    Raises:
        WeightsError: names the file, the key or tensor and what is wrong, before any tensor is read.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        header = _Header(path, handle, size)
        metadata, claims = _read_header(header)
    in_order = sorted(claims, key=lambda claim: claim.start)
    for before, after in pairwise(in_order):
        if before.start + before.size > after.start:
            raise WeightsError(f"{path}: tensors {before.name} and {after.name} overlap")
    return metadata, read_claims(path, claims)


class _Header:
    """A walk over the bytes before the tensors that never leaves the file."""

    def __init__(self, path: Path, handle: BinaryIO, size: int) -> None:
        self.path, self.handle, self.size = path, handle, size
        self.at = 0
        self.items = 0

    def error(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.path}: {reason}")

    @property
    def left(self) -> int:
        return self.size - self.at

    def take(self, count: int, what: str) -> bytes:
        self.expect(count, what)
        found = self.handle.read(count)
        if len(found) != count:
            raise self.error(f"ends within {what}")
        self.at += count
        return found

    def expect(self, count: int, what: str) -> None:
        if count > self.left:
            raise self.error(f"{what} takes {count} bytes, but {self.left} are left of {self.size}")
        if self.at + count > _LARGEST:
            raise self.error(f"{what} lies past the first {_LARGEST} bytes, where no description reaches")

    def skip(self, count: int, what: str) -> None:
        self.expect(count, what)
        self.at += count
        self.handle.seek(self.at)

    def number(self, code: str, what: str) -> int:
        (found,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        return int(found)

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise self.error(f"{what} has {length} bytes; accepted are at most {longest}")
        found = self.take(length, what).decode(errors="replace")
        if not found.isprintable() or "\ufffd" in found:
            raise self.error(f"{what} is no printable text")
        return found

    def value(self, kind: int, what: str, keep_text: bool) -> Value:
        """A value, read if it is a number, or a text to be kept."""
        if kind == _STRING and keep_text:
            return self.text(_LONGEST_TEXT, what)
        if kind not in _SCALARS:
            self.skip_value(kind, what)
            return None
        code = _SCALARS[kind]
        (found,) = struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))
        if kind == _BOOL:
            if found > 1:
                raise self.error(f"{what} is a truth value of {found}; accepted are 0 and 1")
            return bool(found)
        return float(found) if code in "fd" else int(found)

    def skip_value(self, kind: int, what: str, depth: int = 0) -> None:
        """A value, stepped over."""
        if kind in _SCALARS:
            self.skip(struct.calcsize(_SCALARS[kind]), what)
        elif kind == _STRING:
            self.skip(self.number("Q", what), what)
        elif kind == _ARRAY:
            if depth == _DEEPEST:
                raise self.error(f"{what} holds arrays in arrays; accepted are at most {_DEEPEST} levels")
            inner, count = self.number("I", what), self.number("Q", what)
            if inner in _SCALARS:
                self.skip(count * struct.calcsize(_SCALARS[inner]), what)
                return
            self.items += count
            if self.items > _MOST_ITEMS:
                raise self.error(f"{what} holds {count} items; at most {_MOST_ITEMS} in all are accepted")
            self.expect(count * (8 if inner == _STRING else 12), what)
            if inner == _STRING:
                self.skip_strings(count, what)
                return
            for _ in range(count):
                self.skip_value(inner, what, depth + 1)
        else:
            raise self.error(f"{what} has type {kind}; accepted are 0 to 12")

    def skip_strings(self, count: int, what: str) -> None:
        """Strings one after the other: a vocabulary has many, so they are walked over in large pieces."""
        piece, at = b"", 0
        for _ in range(count):
            if at + 8 > len(piece):
                self.skip(at, what)
                piece, at = self.handle.read(min(_PIECE, self.left)), 0
                if len(piece) < 8:
                    raise self.error(f"ends within {what}")
            at += 8 + _LENGTH.unpack_from(piece, at)[0]
        self.skip(at, what)


def _read_header(header: _Header) -> tuple[dict[str, Value], list[Claim]]:
    if header.take(4, "the magic number") != _MAGIC:
        raise header.error("is no GGUF: it does not begin with that word")
    version = header.number("I", "the version")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0 and version != 0
        raise header.error("is a big-endian GGUF" if swapped else f"is GGUF version {version}; accepted are 2 and 3")
    tensors, pairs = header.number("Q", "the number of tensors"), header.number("Q", "the number of pairs")
    if tensors > _MOST_TENSORS or pairs > _MOST_PAIRS:
        raise header.error(
            f"claims {tensors} tensors and {pairs} pairs of metadata; accepted are {_MOST_TENSORS} and {_MOST_PAIRS}"
        )
    metadata = _read_metadata(header, pairs)
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment not in _ALIGNMENTS:
        raise header.error(f"general.alignment is {alignment!r}; accepted are powers of two from 8 to {1 << 16}")
    if metadata.get("split.count", 1) not in (0, 1):
        raise header.error(f"is one of {metadata['split.count']!r} parts of a split model; join them first")
    infos = [_read_info(header) for _ in range(tensors)]
    start = -(-header.at // alignment) * alignment
    claims = []
    for name, number, shape, offset in infos:
        kind = _TYPES[number]
        if offset % alignment:
            raise header.error(f"tensor {name} is at offset {offset}, which is no multiple of {alignment}")
        values, size = (1, kind.dtype.itemsize) if kind.blocks is None else kind.blocks[:2]
        claims.append(Claim(name, kind.dtype, shape, start + offset, math.prod(shape) // values * size, kind.blocks))
    return metadata, claims


def _read_metadata(header: _Header, pairs: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for number in range(pairs):
        key = header.text(_LONGEST_KEY, f"the key of pair {number}")
        if key in metadata:
            raise header.error(f"the key {key!r} is there twice")
        kind = header.number("I", f"the type of {key!r}")
        metadata[key] = header.value(kind, f"the value of {key!r}", key in _KEPT)
    return metadata


class _Info(NamedTuple):
    name: str
    kind: int
    shape: tuple[int, ...]
    offset: int


def _read_info(header: _Header) -> _Info:
    name = header.text(_LONGEST_NAME, "a tensor's name")
    what = f"the description of tensor {name}"
    axes = header.number("I", what)
    if not 1 <= axes <= _MOST_AXES:
        raise header.error(f"tensor {name} has {axes} axes; accepted are 1 to {_MOST_AXES}")
    inner_first = struct.unpack(f"<{axes}Q", header.take(8 * axes, what))
    if 0 in inner_first:
        raise header.error(f"tensor {name} has an empty axis")
    number, offset = header.number("I", what), header.number("Q", what)
    if number not in _TYPES:
        accepted = ", ".join(kind.name for kind in _TYPES.values())
        called = _REFUSED.get(number, f"number {number}")
        raise header.error(f"tensor {name} has type {called}; accepted are {accepted}")
    kind = _TYPES[number]
    if kind.blocks is not None and inner_first[0] % kind.blocks.values:
        raise header.error(
            f"tensor {name} has rows of {inner_first[0]}; {kind.name} comes in blocks of {kind.blocks.values}"
        )
    return _Info(name, number, inner_first[::-1], offset)


def write_gguf(path: Path, metadata: Mapping[str, str | bool | int | float], tensors: Mapping[str, Tensor]) -> None:
    """Write version 3, aligned to 32 bytes, tensors as F32, F16 or BF16 in the given order.

    Integers are written as 32 unsigned bits and floats as float32, as llama.cpp asks for both.

    Raises:
        ValueError: a tensor of another dtype.
    """
    head = bytearray(_MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _packed(key)
        if isinstance(value, str):
            head += struct.pack("<I", _STRING) + _packed(value)
        else:
            kind = _BOOL if isinstance(value, bool) else 4 if isinstance(value, int) else 6
            head += struct.pack(f"<I{_SCALARS[kind]}", kind, value)
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _WRITTEN:
            accepted = ", ".join(map(str, _WRITTEN))
            raise ValueError(f"tensor {name} is {tensor.dtype}; a GGUF holds {accepted}")
        shape = tensor.shape[::-1]
        head += _packed(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _WRITTEN[tensor.dtype], offset)
        offset += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    with open(path, "wb") as handle:
        handle.write(head + bytes(-len(head) % _ALIGNMENT))
        for tensor in tensors.values():
            handle.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))  # type: ignore[arg-type]
            handle.write(bytes(-tensor.nbytes % _ALIGNMENT))


def _packed(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content
