"""Where the cuts fall, that nothing is lost on the way in, and what is said of data that is not there."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.text import Corpus, corpora, decode_text, load_corpus

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def whole(corpus: Corpus) -> bytes:
    return b"".join(part.tobytes() for part in (corpus.train, corpus.valid, corpus.test))


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Files.


@pytest.mark.parametrize("in_memory", [1 << 20, 100], ids=["memory", "mapped"])
@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_is_read_whole(suffix: str, in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_IN_MEMORY", in_memory)
    monkeypatch.setattr(corpora, "_BLOCK", 64)
    data = np.random.default_rng(0).integers(0, 128, 10_000, dtype=np.uint8).tobytes()
    path = write(tmp_path / f"some.text{suffix}", PACKERS[suffix](data))
    seen: list[tuple[int, int | None]] = []
    corpus = load_corpus(path, progress=lambda done, total: seen.append((done, total)))
    assert whole(corpus) == data
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [9000, 500, 500]
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()
    assert corpus.name == path.name
    size = path.stat().st_size
    assert seen[-1] == (size, size)
    assert sorted(seen) == seen
    assert os.listdir(tmp_path) == [path.name], "unpacking leaves nothing behind"


@pytest.mark.parametrize("in_memory", [1 << 20, 100], ids=["memory", "mapped"])
def test_data_cannot_be_written_to(in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_IN_MEMORY", in_memory)
    corpus = load_corpus(write(tmp_path / "text", b"0123456789" * 100))
    assert corpus.train.dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        corpus.train[0] = 1


def test_a_packed_text_is_not_held_in_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "zeros.gz", "wb", compresslevel=1) as out:
        for _ in range(200):
            out.write(bytes(1 << 20))
    code = (
        "import resource, sys; from statewise.text import load_corpus\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "corpus = load_corpus(sys.argv[1], cache_dir=sys.argv[2])\n"
        "print(len(corpus.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    pytest.importorskip("resource", reason="peak memory is asked of the operating system")
    out_text = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "zeros.gz"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    size, grown_kib = map(int, out_text.split())
    assert size == (200 << 20) * 9 // 10
    assert grown_kib < 150 << 10, "64 MiB are spooled in memory before a file is used; the text has 200"
    assert not list((tmp_path / "cache").iterdir())


# Where the cuts fall.


@given(st.integers(1, 500), st.integers(0, 100), st.integers(0, 100))
def test_fractions_are_decimal(tmp_path_factory: pytest.TempPathFactory, size: int, train: int, valid: int) -> None:
    if train + valid > 100:
        train, valid = 100 - train, 100 - valid
    path = write(tmp_path_factory.getbasetemp() / "fractions", bytes(range(65, 75)) * 50)
    path.write_bytes(path.read_bytes()[:size])
    corpus = load_corpus(path, split=(train / 100, valid / 100))
    assert len(corpus.train) == size * train // 100
    assert len(corpus.train) + len(corpus.valid) == size * (train + valid) // 100
    assert whole(corpus) == path.read_bytes()


def test_the_default_split_ends_where_the_fractions_say(tmp_path: Path) -> None:
    """In floating point 0.9 + 0.05 is more than 0.95."""
    corpus = load_corpus(write(tmp_path / "text", b"a" * 2000))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (1800, 100, 100)


@given(st.text(min_size=1, max_size=200), st.integers(0, 10), st.integers(0, 10))
def test_no_character_is_cut(tmp_path_factory: pytest.TempPathFactory, text: str, train: int, valid: int) -> None:
    if train + valid > 10:
        train, valid = 10 - train, 10 - valid
    path = write(tmp_path_factory.getbasetemp() / "characters", text.encode())
    corpus = load_corpus(path, split=(train / 10, valid / 10))
    parts = [decode_text(part, "part") for part in (corpus.train, corpus.valid, corpus.test)]
    assert "".join(parts) == text
    assert 0 <= len(corpus.train) - len(text.encode()) * train // 10 <= 3


def test_bytes_that_are_no_text_are_cut_where_asked(tmp_path: Path) -> None:
    corpus = load_corpus(write(tmp_path / "binary", b"\x80" * 100))
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [90, 5, 5]


def test_byte_offsets(tmp_path: Path) -> None:
    path = write(tmp_path / "text", bytes(range(200)))
    corpus = load_corpus(path, split=(150, 151))
    assert (corpus.train[-1], corpus.valid.tolist(), corpus.test[0]) == (149, [150], 151)
    assert len(load_corpus(path, split=(0, 0)).test) == 200
    assert len(load_corpus(path, split=(200, 200)).train) == 200
    with pytest.raises(ValueError, match=r"split: got the offsets \(1, 201\), but text has 200 bytes"):
        load_corpus(path, split=(1, 201))


@pytest.mark.parametrize(
    "split",
    [(0.9, 0.2), (-0.1, 0.5), (5, 4), (-1, 4), (0.5, 1), (True, True), (0.5,), 0.5, ("a", "b"), (float("nan"), 0.1)],
)
def test_a_split_that_is_none(split: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split: got"):
        load_corpus(write(tmp_path / "text", b"text"), split=split)


# Folders.


def test_a_small_folder_is_joined_in_order(tmp_path: Path) -> None:
    write(tmp_path / "f" / "b.txt", b"2")
    write(tmp_path / "f" / "a" / "z.txt.gz", gzip.compress(b"1"))
    write(tmp_path / "f" / "c.xz", lzma.compress(b"3"))
    write(tmp_path / "f" / ".hidden", b"x")
    write(tmp_path / "f" / ".git" / "config", b"x")
    write(tmp_path / "f" / "empty", b"")
    corpus = load_corpus(tmp_path / "f", split=(1, 2))
    assert (whole(corpus), corpus.name, corpus.valid.tobytes()) == (b"123", "f", b"2")


def folder_of(place: Path, sizes: list[int]) -> dict[str, bytes]:
    contents = {f"{'x/' if i % 2 else ''}{i:03}": f"{i:03}|".encode() * (size // 4) for i, size in enumerate(sizes)}
    for name, content in contents.items():
        write(place / name, content)
    return contents


def test_a_large_folder_is_split_by_file(tmp_path: Path) -> None:
    contents = folder_of(tmp_path / "f", [400] * 98 + [40])
    first, second = sorted(contents, key=lambda name: hashlib.sha256(name.encode()).digest())[:2]
    contents[first] *= 50
    write(tmp_path / "f" / first, contents[first])
    seen: list[tuple[int, int | None]] = []
    corpus = load_corpus(tmp_path / "f", progress=lambda done, total: seen.append((done, total)))
    parts = [part.tobytes() for part in (corpus.train, corpus.valid, corpus.test)]
    for part in parts:
        inside = [name for name, content in contents.items() if content in part]
        assert part == b"".join(contents[name] for name in sorted(inside)), "whole files, in the order of their paths"
    total = sum(map(len, contents.values()))
    assert sum(map(len, parts)) == total
    assert seen[-1] == (total, total)
    assert sorted(seen) == seen
    assert contents[first] in parts[0], "a file that is too large to hold out is trained on"
    assert contents[second] in parts[2], "test is filled first, and comes last"
    assert all(total * 0.05 <= len(part) < total * 0.05 + 400 for part in parts[1:])
    assert load_corpus(tmp_path / "f").sha256 == corpus.sha256
    assert len(load_corpus(tmp_path / "f", split=(0.5, 0.5)).train) == total // 2, "a split given is by position"


def test_where_a_folder_lies_does_not_matter(tmp_path: Path) -> None:
    for place in ("one", "two/three"):
        folder_of(tmp_path / place, [400] * 40)
    first, second = load_corpus(tmp_path / "one"), load_corpus(tmp_path / "two/three")
    assert first.sha256 == second.sha256
    assert first.test.tobytes() == second.test.tobytes()


def test_twenty_files_are_enough_to_hold_some_out(tmp_path: Path) -> None:
    folder_of(tmp_path / "f", [400] * 20)
    corpus = load_corpus(tmp_path / "f")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [7200, 400, 400]


# The interpreter's own library.


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return load_corpus("stdlib")


def test_stdlib_is_always_there(stdlib: Corpus) -> None:
    total = sum(map(len, (stdlib.train, stdlib.valid, stdlib.test)))
    assert stdlib.name == "stdlib"
    assert total > 5_000_000
    for part in (stdlib.valid, stdlib.test):
        assert 0.05 <= len(part) / total < 0.1
    assert sys.version.split()[0] in stdlib.description


def test_stdlib_is_the_same_in_another_process(stdlib: Corpus) -> None:
    code = "from statewise.text import load_corpus; print(load_corpus('stdlib').sha256)"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "LC_ALL": "C"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == stdlib.sha256


def test_stdlib_leaves_out_tests_and_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("os.py", "json/decoder.py"):
        write(tmp_path / name, f"# {name}\n".encode() * 100)
    for name in ("site-packages/a.py", "test/b.py", "json/tests/c.py", "readme.txt", "pydoc_data/topics.py", "dead.py"):
        write(tmp_path / name, b"not wanted")
    (tmp_path / "dead.py").write_bytes(b"")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = load_corpus("stdlib", split=(1.0, 0.0))
    assert whole(corpus) == b"# json/decoder.py\n" * 100 + b"# os.py\n" * 100
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "os.py")
    corpus = load_corpus("stdlib", split=(1.0, 0.0))
    assert whole(corpus) == b"# json/decoder.py\n" * 100
    assert "1 could not be read" in corpus.description
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere: No such file"):
        load_corpus("stdlib")


# What is not there, and what is broken.


def test_missing_and_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^nowhere: does not exist; data is 'stdlib', 'enwik8', a file or a folder$"):
        load_corpus("nowhere")
    with pytest.raises(ValueError, match=r"^stdlib: does not exist"):
        load_corpus(Path("stdlib"))
    for suffix, packed in PACKERS.items():
        path = write(tmp_path / f"empty{suffix}", packed(b""))
        with pytest.raises(ValueError, match=f"{path}: holds no data"):
            load_corpus(path)
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match=f"{folder}: the folder holds no file with data"):
        load_corpus(folder)
    write(folder / "sub" / "empty", b"")
    with pytest.raises(ValueError, match=f"{folder}: the folder holds no file with data"):
        load_corpus(folder)
    write(folder / "empty.gz", gzip.compress(b""))
    with pytest.raises(ValueError, match=f"{folder}: the files in the folder hold no data"):
        load_corpus(folder)
    with pytest.raises(ValueError, match="File name too long"):
        load_corpus("text " * 1000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_data(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is neither a file nor a folder"):
        load_corpus(tmp_path / "pipe")


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("in_folder", [False, True], ids=["alone", "in a folder"])
def test_a_broken_archive_is_named(suffix: str, in_folder: bool, tmp_path: Path) -> None:
    sound = PACKERS[suffix](bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)))
    path = tmp_path / f"broken{suffix}"
    source = tmp_path if in_folder else path
    for keep in (len(sound) - 1, len(sound) // 2, 5):
        path.write_bytes(sound[:keep])
        with pytest.raises(ValueError, match=f"{path}: cut short"):
            load_corpus(source)
    for wrong in (b"plain text, not packed at all " * 10, sound[:3000] + b"\0" * 64 + sound[3064:]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=f"{path}: "):
            load_corpus(source)


def test_an_archive_cannot_fill_the_disk(tmp_path: Path) -> None:
    bomb = write(tmp_path / "bomb.xz", lzma.compress(bytes(10_000_000)))
    with pytest.raises(ValueError, match=f"{bomb}: more than max_bytes = 9999999 bytes"):
        load_corpus(bomb, max_bytes=9_999_999)
    assert len(load_corpus(bomb, max_bytes=10_000_000).train) == 9_000_000
    for name in ("a.xz", "b.xz"):
        write(tmp_path / "folder" / name, lzma.compress(bytes(600)))
    with pytest.raises(ValueError, match=r"b\.xz: more than max_bytes = 1000"):
        load_corpus(tmp_path / "folder", max_bytes=1000)
    folder_of(tmp_path / "large", [400] * 20)
    with pytest.raises(ValueError, match="more than max_bytes = 7999"):
        load_corpus(tmp_path / "large", max_bytes=7999)
    assert len(load_corpus(tmp_path / "large", max_bytes=8000).train) == 7200


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "text.gz", gzip.compress(b"text"))
    monkeypatch.setattr("tempfile.SpooledTemporaryFile", full)
    with pytest.raises(ValueError, match=f"{path}: No space left on device"):
        load_corpus(path)


# Text.


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_decode_text(kind: Any) -> None:
    assert decode_text(kind("aé€".encode()), "x") == "aé€"
    with pytest.raises(ValueError, match=r"^notes.txt: not UTF-8 text: byte 0xff at offset 3: invalid start byte$"):
        decode_text(kind(b"abc\xff"), "notes.txt")
    with pytest.raises(ValueError, match="byte 0xe2 at offset 1"):
        decode_text(kind(b"a\xe2\x82"), "notes.txt")


def test_gcide_is_cut_as_published(shared: Path) -> None:
    corpus = load_corpus(shared / "data/text/gcide.txt.xz")
    assert corpus.sha256.startswith("802beb66")
    assert len(corpus.train) + len(corpus.valid) == 37_954_704
