"""Whatever a GGUF claims: one WeightsError, soon, in little memory."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import statewise
from statewise import WeightsError
from statewise.testing.memory import resident_peak
from statewise.weights import read

SECONDS, MIB = 2.0, 64
U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
ARCHITECTURE = ("general.architecture", STRING, "rwkv7")


def text(content: str | bytes, length: int | None = None) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content) if length is None else length) + content


def pair(key: str | bytes, kind: int, value: str | int | float | bytes) -> bytes:
    """A pair of metadata; bytes go in as they are."""
    if isinstance(value, bytes):
        packed = value
    elif isinstance(value, str):
        packed = text(value)
    else:
        packed = struct.pack({F32: "<f", BOOL: "<B", U64: "<Q"}.get(kind, "<I"), value)
    return text(key) + struct.pack("<I", kind) + packed


def array(inner: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", inner, count) + content


def nested(depth: int) -> bytes:
    return array(ARRAY, 1) * depth + array(U32, 0)


def info(
    name: str | bytes = "token_embd.weight", axes: tuple[int, ...] = (8, 4), kind: int = 0, offset: int = 0
) -> bytes:
    return text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)


def gguf(
    *pairs: bytes,
    infos: tuple[bytes, ...] = (info(),),
    data: int = 128,
    version: int = 3,
    magic: bytes = b"GGUF",
    tensors: int | None = None,
    count: int | None = None,
) -> bytes:
    """A file whose parts may lie; with nothing said it is whole, though no model."""
    pairs = (pair(*ARCHITECTURE), *pairs)
    head = magic + struct.pack(
        "<IQQ", version, len(infos) if tensors is None else tensors, len(pairs) if count is None else count
    )
    head += b"".join(pairs) + b"".join(infos)
    return head + bytes(-len(head) % 32) + bytes(data)


HUGE = 1 << 40
LYING: dict[str, tuple[bytes, str]] = {
    "magic alone": (b"GGUF", "the version"),
    "version 1": (gguf(version=1), "version 1; accepted are 2 and 3"),
    "version 4": (gguf(version=4), "version 4"),
    "version 0": (gguf(version=0), "version 0"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "no tensors": (gguf(infos=(), data=0), "no tensors"),
    "huge count of tensors": (gguf(tensors=HUGE), "claims 1099511627776 tensors"),
    "most tensors of all": (gguf(tensors=(1 << 64) - 1), "claims 18446744073709551615 tensors"),
    "more tensors than there are": (gguf(tensors=16), "has 0 axes"),
    "huge count of pairs": (gguf(count=HUGE), "1099511627776 pairs"),
    "more pairs than there are": (gguf(count=200), "pair"),
    "fewer pairs than there are": (gguf(pair("x", U32, 1), count=1), "tensor x"),
    "a long key": (gguf(pair("k" * 2000, U32, 1)), "the key of pair 1 has 2000 bytes"),
    "an endless key": (gguf(text(b"k", HUGE)), "the key of pair 1 has 1099511627776 bytes"),
    "a key past the end": (gguf(text(b"k", 1000)), "the key of pair 1 takes 1000 bytes"),
    "a key that is no text": (gguf(pair(b"\xff\xfe", U32, 1)), "the key of pair 1 is no printable text"),
    "a key twice": (gguf(pair("x", U32, 1), pair("x", U32, 1)), "'x' is there twice"),
    "the architecture twice": (gguf(pair(*ARCHITECTURE)), "there twice"),
    "an unknown type of value": (gguf(pair("x", 13, b"")), "type 13; accepted are 0 to 12"),
    "the largest type of value": (gguf(pair("x", 0xFFFFFFFF, b"")), "type 4294967295"),
    "an endless string": (gguf(pair("x", STRING, text(b"", HUGE))), "takes 1099511627776 bytes"),
    "a string that wraps around": (gguf(pair("x", STRING, text(b"", (1 << 64) - 8))), "takes 18446744073709551608"),
    "a long architecture": (gguf(pair("statewise.config", STRING, "x" * 70_000)), "has 70000 bytes"),
    "no text where text is kept": (gguf(pair("statewise.config", STRING, text(b"\xff"))), "is no printable text"),
    "a truth value of two": (gguf(pair("x", BOOL, 2)), "truth value of 2"),
    "an endless array": (gguf(pair("x", ARRAY, array(U32, HUGE))), "takes 4398046511104 bytes"),
    "an array that wraps around": (gguf(pair("x", ARRAY, array(U64, 1 << 61))), "takes 18446744073709551616 bytes"),
    "an endless array of bytes": (gguf(pair("x", ARRAY, array(0, HUGE))), "takes 1099511627776 bytes"),
    "an endless array of strings": (gguf(pair("x", ARRAY, array(STRING, HUGE))), "holds 1099511627776 items"),
    "more strings than there are": (gguf(pair("x", ARRAY, array(STRING, 1000))), "takes 8000 bytes"),
    "an endless string in an array": (gguf(pair("x", ARRAY, array(STRING, 1, text(b"", HUGE)))), "takes 1099511627784"),
    "an endless array of arrays": (gguf(pair("x", ARRAY, array(ARRAY, HUGE))), "holds 1099511627776 items"),
    "more arrays than there are": (gguf(pair("x", ARRAY, array(ARRAY, 100))), "takes 1200 bytes"),
    "arrays in arrays": (gguf(pair("x", ARRAY, nested(5))), "arrays in arrays"),
    "arrays without end": (gguf(pair("x", ARRAY, nested(100_000))), "arrays in arrays"),
    "an array of an unknown type": (gguf(pair("x", ARRAY, array(99, 1))), "type 99"),
    "millions of empty strings": (
        gguf(pair("x", ARRAY, array(STRING, 3 << 20, bytes(24 << 20)))),
        "holds 3145728 items",
    ),
    "a million strings, twice": (
        gguf(*(pair(key, ARRAY, array(STRING, 300_000, bytes(2_400_000))) for key in "xy")),
        "holds 300000 items; at most 524288",
    ),
    "an alignment of zero": (gguf(pair("general.alignment", U32, 0)), "alignment is 0"),
    "an odd alignment": (gguf(pair("general.alignment", U32, 24)), "alignment is 24"),
    "a large alignment": (gguf(pair("general.alignment", U32, 1 << 31)), "alignment is 2147483648"),
    "an alignment that is a float": (gguf(pair("general.alignment", F32, 32.0)), "alignment is 32.0"),
    "an alignment that is text": (gguf(pair("general.alignment", STRING, "32")), "alignment is None"),
    "one part of several": (gguf(pair("split.count", 2, b"\x04\x00")), "one of 4 parts"),
    "a part of text": (gguf(pair("split.count", STRING, "many")), "one of None parts"),
    "a long name": (gguf(infos=(info("n" * 65),)), "has 65 bytes; accepted are at most 64"),
    "an endless name": (gguf(infos=(text(b"n", HUGE),)), "has 1099511627776 bytes"),
    "a name that is no text": (gguf(infos=(info(b"\xc3\x28"),)), "a tensor's name is no printable text"),
    "a name twice": (gguf(infos=(info(), info(offset=128)), data=256), "two tensors are called token_embd.weight"),
    "no axes": (gguf(infos=(info(axes=()),)), "has 0 axes; accepted are 1 to 4"),
    "five axes": (gguf(infos=(info(axes=(2, 2, 2, 2, 2)),)), "has 5 axes"),
    "axes without end": (gguf(infos=(text("x") + struct.pack("<I", 0xFFFFFFFF),)), "has 4294967295 axes"),
    "an empty axis": (gguf(infos=(info(axes=(0, 1 << 61)),)), "has an empty axis"),
    "a huge axis": (gguf(infos=(info(axes=(HUGE,)),)), "lies at bytes"),
    "axes that overflow": (gguf(infos=(info(axes=(1 << 32, 1 << 32, 1 << 32, 1 << 32)),)), "lies at bytes"),
    "the largest axis": (gguf(infos=(info(axes=((1 << 64) - 1,)),)), "lies at bytes"),
    "an unknown type": (gguf(infos=(info(kind=1000),)), "type number 1000; accepted are F32, F16, BF16, Q4_0, Q8_0"),
    "a removed type": (gguf(infos=(info(kind=4),)), "type number 4"),
    "a type we do not read": (gguf(infos=(info(axes=(256, 1), kind=12),)), "type Q4_K; accepted"),
    "double precision": (gguf(infos=(info(axes=(4, 4), kind=28),)), "type F64; accepted"),
    "integers": (gguf(infos=(info(kind=26),)), "type I32; accepted"),
    "half a block": (gguf(infos=(info(axes=(48, 2), kind=8),)), "rows of 48; Q8_0 comes in blocks of 32"),
    "half a small block": (gguf(infos=(info(axes=(16,), kind=2),)), "rows of 16; Q4_0 comes in blocks of 32"),
    "blocks past the end": (gguf(infos=(info(axes=(32, 4), kind=8),)), "lies at bytes"),
    "an offset between": (gguf(infos=(info(axes=(8,), offset=4),)), "offset 4, which is no multiple of 32"),
    "an offset past the end": (gguf(infos=(info(offset=1 << 20),)), "lies at bytes"),
    "the largest offset": (gguf(infos=(info(offset=(1 << 64) - 32),)), "lies at bytes"),
    "a tensor half past the end": (gguf(infos=(info(offset=32),)), "lies at bytes"),
    "tensors that overlap": (gguf(infos=(info("a", (16,)), info("b", (16,), offset=32))), "a and b overlap"),
    "tensors in one place": (gguf(infos=(info("a"), info("b"))), "a and b overlap"),
    "a tensor within another": (gguf(infos=(info("a", (32,)), info("b", (8,), offset=64))), "a and b overlap"),
    "no data": (gguf(data=0), "lies at bytes"),
    "no model": (gguf(), "rwkv7.wkv.head_size is None"),
}


def refused(path: Path, message: str = "") -> bool:
    """Whether it was; anything but a WeightsError comes through."""
    start = time.perf_counter()
    said = None
    try:
        read(path)
    except WeightsError as error:
        said = str(error)
    assert time.perf_counter() - start <= SECONDS
    if said is not None:
        assert str(path) in said
    if message:
        assert message in (said or ""), said
    return said is not None


@pytest.mark.parametrize("name", LYING)
def test_lies_are_refused(tmp_path: Path, name: str) -> None:
    content, message = LYING[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    before = resident_peak(reset=True)
    assert refused(path, message)
    after = resident_peak(reset=False)
    if before is not None and after is not None:
        assert after - before <= MIB << 20


def test_many_blocks_of_which_most_is_missing_are_refused_soon(tmp_path: Path) -> None:
    """To build a block takes longer than to name it."""
    infos = [info(f"blk.{i}.attn_norm.weight", (8,), offset=32 * i) for i in range(1 << 14)]
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(pair("rwkv7.wkv.head_size", U32, 4), infos=tuple(infos), data=1 << 19))
    start = time.perf_counter()
    with pytest.raises(WeightsError, match=r"blocks\.\d+\.att\.a0 is missing"):
        statewise.load(path)
    assert time.perf_counter() - start <= SECONDS


@pytest.mark.parametrize(
    ("value", "infos", "message"),
    [
        (array(STRING, 1 << 19, bytes(4 << 20)), (info(axes=(HUGE,)),), "lies at bytes"),
        (array(STRING, 2, text(b"", 65 << 20)), (), "past the first 67108864 bytes"),
        (array(U32, 1 << 25), (), "past the first 67108864 bytes"),
    ],
)
def test_large_files_are_refused_soon(tmp_path: Path, value: bytes, infos: tuple[bytes, ...], message: str) -> None:
    """As many strings as are accepted, or long ones, and a sparse gigabyte behind them: the walk is bounded."""
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf(pair("x", ARRAY, value), infos=infos))
    with open(path, "r+b") as handle:
        handle.truncate(1 << 30)
    before = resident_peak(reset=True)
    assert refused(path, message)
    after = resident_peak(reset=False)
    if before is not None and after is not None:
        assert after - before <= MIB << 20


def damaged(content: bytes, header: int) -> Iterator[bytes]:
    """Cut anywhere, changed anywhere in the header: 440 files."""
    draw = random.Random(5)
    for i in range(60):
        yield content[: header * i // 60]
    for i in range(20):
        yield content[: header + (len(content) - header) * i // 20]
    for _ in range(240):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(header)] ^= 1 << draw.randrange(8)
        yield bytes(changed)
    for _ in range(120):
        at, length = draw.randrange(header), draw.randint(1, 32)
        yield content[:at] + draw.randbytes(length) + content[at + length :]


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7", "mamba", "mamba2"])
def test_damaged_files_are_refused_or_whole(tmp_path: Path, name: str) -> None:
    sizes = {} if name == "mamba" else {"head_size": 4}
    model = statewise.create(name, vocab_size=8, num_layers=1, width=8, **sizes)
    path = tmp_path / "model.gguf"
    statewise.save(model, path, "gguf")
    content = path.read_bytes()
    header = len(content) - sum(-(-p.nbytes // 32) * 32 for p in model.state_dict().values()) + 64
    before = resident_peak(reset=True)
    count = 0
    for changed in damaged(content, header):
        path.write_bytes(changed)
        count += refused(path)
    after = resident_peak(reset=False)
    assert count >= 200, "damage goes unnoticed"
    if before is not None and after is not None:
        assert after - before <= MIB << 20
