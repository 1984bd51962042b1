"""Whatever a file holds: the tensors it says, or one WeightsError, soon, in little memory, and nothing of it is run."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as safetensors_bytes

from statewise import WeightsError
from statewise.testing.memory import resident_peak
from statewise.weights import read
from statewise.weights.files import read_tensors

SECONDS, MIB = 2.0, 64


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"emb.weight": (16, 8), "blocks.0.att.time_decay": (8,), "head.weight": (16, 8), "empty": (5, 0, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def pth() -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors(), buffer)
    return buffer.getvalue()


def damaged(content: bytes, seed: int) -> Iterator[bytes]:
    """Cut anywhere, flipped anywhere, filled with anything: 130 files."""
    draw = random.Random(seed)
    for i in range(40):
        yield content[: len(content) * i // 40]
    for _ in range(70):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
        yield bytes(changed)
    for _ in range(20):
        at, length = draw.randrange(len(content)), draw.randint(1, 64)
        yield content[:at] + draw.randbytes(length) + content[at + length :]


def zipped(data: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, record in (records or {"0": bytes(64)}).items():
            archive.writestr(f"archive/data/{key}", record)
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def described(
    shape: tuple[Any, ...], strides: tuple[Any, ...], offset: Any = 0, numel: Any = 16, kind: str = "FloatStorage"
) -> bytes:
    """A pickle of one tensor, as torch writes it, but for the numbers."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):  # type: ignore[misc,name-defined]
        def persistent_id(self, thing: Any) -> Any:
            return ("storage", getattr(torch, kind), "0", "cpu", numel) if isinstance(thing, Storage) else None

    class Tensor:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, strides, False, {})  # type: ignore[attr-defined]

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({"x": Tensor()})
    return buffer.getvalue()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


HANDMADE: dict[str, Callable[[], bytes]] = {
    "a function of the system": lambda: zipped(pickle.dumps({"x": print}, 2)),
    "builtins.eval": lambda: zipped(opcodes(b"cbuiltins\neval\n", b"X\x01\x00\x00\x001", b"\x85R")),
    "a newer opcode that looks up": lambda: zipped(pickle.dumps({"x": Path}, 4)),
    "torch.load within": lambda: zipped(opcodes(b"ctorch\nload\n", b"X\x01\x00\x00\x00x", b"\x85R")),
    "numbers instead of tensors": lambda: zipped(pickle.dumps({"x": 1}, 2)),
    "a list": lambda: zipped(pickle.dumps([1, 2], 2)),
    "names that are tuples": lambda: zipped(pickle.dumps({("a", "b"): None}, 2)),
    "tuples in tuples as a name": lambda: zipped(opcodes(b"}", b")" + b"\x85" * 200_000, b"Ns")),
    "tuples in tuples": lambda: zipped(opcodes(b")" + b"\x85" * 200_000)),
    "a far memo": lambda: zipped(opcodes(b"}", b"r" + struct.pack("<I", 0xFFFFFFF0))),
    "an absent memo": lambda: zipped(opcodes(b"h\x07")),
    "an empty stack": lambda: zipped(opcodes(b"\x87")),
    "a long name": lambda: zipped(opcodes(b"X" + struct.pack("<I", 0x7FFFFFFF) + b"x")),
    "no end": lambda: zipped(b"\x80\x02}"),
    "a huge pickle": lambda: zipped(opcodes(b"N0" * (1 << 20))),
    "a million numbers": lambda: zipped(opcodes(b"(" + b"K\x01" * 500_000 + b"t")),
    "negative sizes": lambda: zipped(described((-4,), (1,))),
    "sizes that are floats": lambda: zipped(described((4.0,), (1,))),
    "sizes that are true": lambda: zipped(described((True,), (1,))),
    "strides that overlap": lambda: zipped(described((4, 4), (0, 1))),
    "strides that transpose": lambda: zipped(described((4, 4), (1, 4))),
    "fewer strides than axes": lambda: zipped(described((4, 4), (1,))),
    "past the storage": lambda: zipped(described((17,), (1,))),
    "before the storage": lambda: zipped(described((4,), (1,), offset=-4)),
    "a terabyte": lambda: zipped(described((1 << 40,), (1,), numel=1 << 40)),
    "an overflow": lambda: zipped(described((1 << 61, 1 << 61), (1 << 61, 1), numel=1 << 61)),
    "a storage without a size": lambda: zipped(described((4,), (1,), numel="16")),
    "a storage of another dtype": lambda: zipped(described((4,), (1,), kind="DoubleStorage")),
    "complex numbers": lambda: zipped(described((4,), (1,), kind="ComplexFloatStorage")),
    "a short record": lambda: zipped(described((16,), (1,)), {"0": bytes(60)}),
    "no record": lambda: zipped(described((16,), (1,)), {"1": bytes(64)}),
    "compressed": lambda: zipped(described((16,), (1,)), compression=zipfile.ZIP_DEFLATED),
    "a bomb": lambda: zipped(described((16,), (1,)), {"0": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "an empty zip": lambda: b"PK\x05\x06" + bytes(18),
    "no pickle": lambda: _only({"archive/data/0": bytes(64)}),
    "two pickles": lambda: _only({"a/data.pkl": pickle.dumps({}, 2), "b/data.pkl": pickle.dumps({}, 2)}),
    "big-endian": lambda: _only({"a/data.pkl": described((0,), (1,)), "a/data/0": bytes(64), "a/byteorder": b"big"}),
}


def _only(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def header(text: bytes | dict[str, Any], data: bytes = bytes(64)) -> bytes:
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64], **changes}}


SAFETENSORS: dict[str, bytes] = {
    "no header": b"\x00" * 4,
    "an endless header": struct.pack("<Q", 1 << 60) + b"{}",
    "a header past the end": struct.pack("<Q", 100) + b"{}",
    "an empty header": header({}),
    "a header that is a list": header(b"[]"),
    "half a header": header(b'{"x": {'),
    "lists in lists": header(b"[" * 100_000),
    "a name twice": header(b'{"x": {"dtype": "F32"}, "x": {"dtype": "F32"}}'),
    "not text": header(b"\xff\xfe" * 20),
    "an unknown dtype": header(entry(dtype="F8_E4M3")),
    "a dtype that is a list": header(entry(dtype=[])),
    "no shape": header(entry(shape=None)),
    "a negative shape": header(entry(shape=[-4, -4])),
    "a shape of floats": header(entry(shape=[4.0, 4])),
    "a shape of booleans": header(entry(shape=[True] * 4)),
    "a shape too large": header(entry(shape=[1 << 40, 1 << 40])),
    "many axes": header(entry(shape=[1] * 60 + [16])),
    "bytes that differ from the shape": header(entry(shape=[4, 5])),
    "offsets past the end": header(entry(data_offsets=[64, 128])),
    "offsets backwards": header(entry(data_offsets=[64, 0])),
    "three offsets": header(entry(data_offsets=[0, 32, 64])),
    "negative offsets": header(entry(data_offsets=[-64, 0])),
    "an entry that is a number": header({"x": 3}),
    "overlaps without end": header(
        {f"x{i}": {"dtype": "F32", "shape": [15], "data_offsets": [4 * (i % 2), 60 + 4 * (i % 2)]} for i in range(2)}
    ),
    "a header of a hundred megabytes": struct.pack("<Q", 100 << 20) + b" " * (100 << 20),
}


def refused(path: Path) -> bool:
    """Whether it was; anything but a WeightsError comes through."""
    start = time.perf_counter()
    message = ""
    try:
        read_tensors(path)
    except WeightsError as error:
        message = str(error)
    assert time.perf_counter() - start <= SECONDS
    assert not message or str(path) in message
    return bool(message)


@pytest.mark.parametrize("name", HANDMADE)
def test_handmade_zips_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(HANDMADE[name]())
    before = resident_peak(reset=True)
    assert refused(path)
    after = resident_peak(reset=False)
    if before is not None and after is not None:
        assert after - before <= MIB << 20


@pytest.mark.parametrize("name", SAFETENSORS)
def test_handmade_safetensors_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[name])
    before = resident_peak(reset=True)
    assert refused(path)
    after = resident_peak(reset=False)
    if before is not None and after is not None:
        assert after - before <= MIB << 20


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files_are_refused_or_whole(tmp_path: Path, suffix: str) -> None:
    content = pth() if suffix == ".pth" else safetensors_bytes(tensors())
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    whole = read_tensors(path)
    assert all(torch.equal(whole[name], tensor) for name, tensor in tensors().items())
    before = resident_peak(reset=True)
    count = 0
    for changed in damaged(content, seed=3):
        path.write_bytes(changed)
        count += refused(path)
    after = resident_peak(reset=False)
    assert count >= 60, "damage goes unnoticed"
    if before is not None and after is not None:
        assert after - before <= MIB << 20


def test_a_record_that_changed_is_noticed(tmp_path: Path) -> None:
    """safetensors has no checksums; a zip has, and they are held."""
    content = bytearray(pth())
    at = content.index(tensors()["emb.weight"].numpy().tobytes())
    content[at + 5] ^= 16
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"emb\.weight is damaged"):
        read_tensors(path)


def directory(tmp_path: Path, index: object) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "one.safetensors").write_bytes(safetensors_bytes(tensors()))
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes({"empty": torch.zeros(1)}))
    return tmp_path


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "no weight_map"),
        ([], "expected an object"),
        ({"weight_map": {"x": 3}}, "no weight_map"),
        ({"weight_map": {"x": "../one.safetensors"}}, "not in this directory"),
        ({"weight_map": {"x": "/etc/passwd"}}, "not in this directory"),
        ({"weight_map": {"x": "three.safetensors"}}, "not in this directory"),
        ({"weight_map": {"x": "one.safetensors", "y": "two.safetensors"}}, "empty is in another file"),
    ],
)
def test_an_index_names_files_beside_it(tmp_path: Path, index: object, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        read(directory(tmp_path, index))


@pytest.mark.parametrize("name", ["rwkv7", "mamba"])
def test_thousands_of_blocks_are_not_built_to_find_them_empty(tmp_path: Path, name: str) -> None:
    import statewise

    model = statewise.create(name, vocab_size=4, num_layers=2, width=64)
    statewise.save(model, tmp_path / "model", "mamba-ssm" if name == "mamba" else "statewise")
    where = next((tmp_path / "model").glob("*.bin" if name == "mamba" else "*.safetensors"))
    tensors = read_tensors(where)
    some = next(key for key in tensors if ".1." in key)
    tensors |= {some.replace(".1.", f".{index}."): tensors[some] for index in range(2, 9000)}
    torch.save(tensors, tmp_path / "deep.pth")
    start = time.process_time()
    with pytest.raises(WeightsError, match="is missing"):
        statewise.load(tmp_path / "deep.pth", **({} if name == "rwkv7" else {"num_layers": 9000}))
    assert time.process_time() - start < 2


def test_memory_holds_a_checkpoint_once(tmp_path: Path) -> None:
    values = torch.linspace(-3, 3, 5 << 20)  # no whole number of the pieces that are cast
    big = {f"blocks.{i}.weight": values.to(torch.bfloat16) for i in range(16)}  # 160 MiB
    for path, write in (
        (tmp_path / "model.pth", lambda p: torch.save(big, p)),
        (tmp_path / "model.safetensors", lambda p: p.write_bytes(safetensors_bytes(big))),
    ):
        write(path)
    size = sum(tensor.nbytes for tensor in big.values())
    big.clear()
    for path in (tmp_path / "model.pth", tmp_path / "model.safetensors"):
        for dtype, takes in ((None, size), (torch.float32, 2 * size)):
            before = resident_peak(reset=True)
            found = read_tensors(path, dtype)
            after = resident_peak(reset=False)
            assert len(found) == 16
            assert torch.equal(found["blocks.3.weight"], values.to(torch.bfloat16).to(dtype or torch.bfloat16))
            del found
            if before is not None and after is not None:
                assert after - before <= 1.15 * takes


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_mapped_tensors_are_the_files_own_until_written_to(tmp_path: Path, kind: str) -> None:
    given = {"one": torch.randn(1 << 20), "two": torch.randn(3, 5).to(torch.bfloat16), "none": torch.empty(0, 4)}
    path = tmp_path / f"model.{kind}"
    torch.save(given, path) if kind == "pth" else path.write_bytes(safetensors_bytes(given))
    before = path.read_bytes()
    for dtype in (None, torch.float32):
        found = read_tensors(path, dtype, mapped=True)
        for name, tensor in given.items():
            assert torch.equal(found[name], tensor if dtype is None else tensor.to(dtype))
    found["one"].zero_()
    assert float(found["one"].abs().max()) == 0
    assert path.read_bytes() == before
    assert torch.equal(read_tensors(path, mapped=True)["one"], given["one"])


def test_what_is_mapped_is_held_against_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"one": torch.arange(1 << 23, dtype=torch.float32)}, path)  # of two pieces
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="one is damaged"):
        read_tensors(path, mapped=True)
