"""Text to train and test on, as byte sequences in three parts: train, valid, test.

Where the cuts fall, unless ``split`` says otherwise:

- By position (a file, or a folder of fewer than 20 files): the first 90 % of the bytes, the next 5 %, the last 5 %.
  A cut that would fall inside a UTF-8 character moves past it, at most three bytes.
- By file (``"stdlib"``, or a folder of 20 files or more): files are put in the order of the SHA-256 of their relative
  paths. Along it, files go to test until it has 5 % of the bytes (as they lie on disk), then to valid until that has
  5 %; all others go to train, and so does any file that alone is more than 5 %. Within a part, files follow each other
  in the order of their paths.
- enwik8: the customary 90, 5 and 5 million bytes.

Files are joined as they are, with nothing between them.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import mmap
import os
import platform
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import IO, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from statewise.text import enwik8

__all__ = ["Corpus", "decode_text", "load_corpus"]

ByteArray: TypeAlias = npt.NDArray[np.uint8]
Progress: TypeAlias = Callable[[int, int | None], None]
Split: TypeAlias = tuple[float, float] | tuple[int, int]

_DEFAULT_SPLIT = (0.9, 0.05)
_HELD_OUT = Fraction(5, 100)
_FILES_FOR_SPLIT_BY_FILE = 20
_BLOCK = 1 << 20
_IN_MEMORY = 64 << 20  # larger texts lie in a file and are mapped
_OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    ".gz": lambda raw: cast("IO[bytes]", gzip.GzipFile(fileobj=raw)),
    ".xz": lambda raw: cast("IO[bytes]", lzma.LZMAFile(raw)),  # noqa: SIM115 - closed with the file it reads
    ".bz2": lambda raw: cast("IO[bytes]", bz2.BZ2File(raw)),
}
# Generated documentation in one file, a fifteenth of the whole and unlike the rest; and what distributions often omit.
_STDLIB_LEFT_OUT = frozenset(
    {"__pycache__", "dist-packages", "idle_test", "pydoc_data", "site-packages", "test", "tests"}
)


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts.

    The arrays are read-only uint8 vectors, any of them possibly empty. A text of more than 64 MiB is mapped from disk
    rather than held in memory, so a plain file of that size must not be changed while it is in use.
    """

    name: str
    train: ByteArray = field(repr=False)
    valid: ByteArray = field(repr=False)
    test: ByteArray = field(repr=False)
    description: str
    """One line: what it is and how it is split."""

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of train, valid and test one after the other: for a split by position, of the whole text."""
        digest = hashlib.sha256()
        for part in (self.train, self.valid, self.test):
            digest.update(part.data)
        return digest.hexdigest()


def load_corpus(
    source: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    split: Split | None = None,
    max_bytes: int = 8 << 30,
    url: str = enwik8.URL,
    progress: Progress | None = None,
) -> Corpus:
    """Open a text to train or test on.

    Args:
        source: one of

            - ``"stdlib"``: the source (.py) of the running interpreter's own library, without its tests, its generated
              help texts and installed packages; the same bytes at every call. A file that cannot be read is left out
              and counted in the description.
            - ``"enwik8"``: ``enwik8`` or ``enwik8.zip`` in ``cache_dir`` or in the current folder, else downloaded into
              ``cache_dir``; checked by its published SHA-1. A path to a file of either name is checked the same way.
            - a file, any bytes. Unpacked if the name ends in .gz, .xz or .bz2.
            - a folder: all files in and below it, in the order of their paths, unpacked likewise. Names that begin with
              a dot are left out; links to files are followed, links to folders are not.

            The words name a file or folder instead if given as a ``pathlib.Path``.
        cache_dir: where enwik8 is kept, and where texts over 64 MiB are unpacked or joined, to a nameless file that
            disappears with the process. None: ``$XDG_CACHE_HOME/statewise`` or ``~/.cache/statewise``, and the
            system's temporary folder.
        split: None, for the rule at the top of this file; else the text (a folder's files joined) is cut by position:
            two floats are the fractions that are train and valid, two ints the byte offsets where train and valid end.
            The rest is test. The cut at fraction f of n bytes is the byte ⌊f·n⌋, moved past the end of a character.
        max_bytes: the most that may be unpacked or joined; a guard against archives made to fill the disk.
        url: where enwik8.zip is downloaded from.
        progress: called as ``progress(done, total)`` in bytes read (on disk, before unpacking) or downloaded; total is
            None where a server does not tell.

    Raises:
        ValueError: nothing there, nothing in it, a broken archive, a failed download, too much data, a split that does
            not fit; names the path and the reason.
    """
    if split is not None:
        _check_split(split)
    folder = None if cache_dir is None else Path(cache_dir)
    gather = _Gatherer(folder, max_bytes, progress)
    try:
        if source == "stdlib":
            return _stdlib(gather, split)
        path = enwik8.find(folder or _default_cache(), url, progress) if source == "enwik8" else Path(source)
        return _from_path(path, gather, split)
    except OSError as error:
        raise ValueError(f"{error.filename or source}: {error.strerror or error}") from None


def decode_text(data: bytes | bytearray | memoryview | ByteArray, source: str | os.PathLike[str]) -> str:
    """Bytes as text, for those who need characters.

    Args:
        data: UTF-8.
        source: what to call it in the error.

    Raises:
        ValueError: not UTF-8; names ``source`` and the offset of the first byte that does not fit.
    """
    content = bytes(data)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source}: not UTF-8 text: byte 0x{content[error.start]:02x} at offset {error.start}: {error.reason}"
        ) from None


def _from_path(path: Path, gather: _Gatherer, split: Split | None) -> Corpus:
    if path.is_dir():
        return _folder(path, gather, split)
    if not path.is_file():
        what = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise ValueError(f"{path}: {what}; data is 'stdlib', 'enwik8', a file or a folder")
    if path.name in ("enwik8", "enwik8.zip"):
        return _enwik8(path, gather, split)
    whole = gather.file(path)
    if not len(whole):
        raise ValueError(f"{path}: holds no data")
    return _by_position(path.name, path.name, whole, split or _DEFAULT_SPLIT)


class _Gatherer:
    """Reads, unpacks and joins files without holding a text twice."""

    def __init__(self, folder: Path | None, max_bytes: int, progress: Progress | None) -> None:
        self.folder, self.max_bytes, self.progress = folder, max_bytes, progress
        self._joined = 0

    def file(self, path: Path) -> ByteArray:
        """One file; a plain one as it lies, whatever its size."""
        size = path.stat().st_size
        if path.suffix.lower() in _OPENERS:
            return self.join(self._blocks(path, 0, size))
        with open(path, "rb") as handle:
            whole = _mapped(handle) if size > _IN_MEMORY else np.frombuffer(handle.read(), np.uint8)
        if self.progress is not None:
            self.progress(size, size)
        return whole

    def files(self, paths: Sequence[Path], sizes: Sequence[int], parts: Sequence[int]) -> list[ByteArray]:
        """Join the files of each part (0, 1, 2: any number of them may be absent)."""
        total, done = sum(sizes), 0
        joined = []
        for part in (0, 1, 2):
            mine = [(path, size) for path, size, where in zip(paths, sizes, parts, strict=True) if where == part]
            joined.append(self.join(self._chain(mine, done, total)))
            done += sum(size for _, size in mine)
        return joined

    def join(self, blocks: Iterator[bytes]) -> ByteArray:
        """One array of all blocks: in memory up to 64 MiB, else in a nameless file."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        size = 0
        with tempfile.SpooledTemporaryFile(
            max_size=_IN_MEMORY, dir=None if self.folder is None else str(self.folder)
        ) as out:
            for block in blocks:
                size += len(block)
                self._joined += len(block)
                out.write(block)
            if size > _IN_MEMORY:
                out.flush()
                return _mapped(out)
            out.seek(0)
            return np.frombuffer(out.read(), np.uint8)

    def _chain(self, files: Sequence[tuple[Path, int]], done: int, total: int) -> Iterator[bytes]:
        for path, size in files:
            yield from self._blocks(path, done, total)
            done += size

    def _blocks(self, path: Path, done: int, total: int) -> Iterator[bytes]:
        try:
            with open(path, "rb") as raw:
                opener = _OPENERS.get(path.suffix.lower())
                stream = raw if opener is None else opener(raw)
                while block := stream.read(_BLOCK):
                    if self._joined + len(block) > self.max_bytes:
                        raise ValueError(f"{path}: more than max_bytes = {self.max_bytes} bytes of text")
                    yield block
                    if self.progress is not None:
                        self.progress(done + raw.tell(), total)
        except EOFError:
            raise ValueError(f"{path}: cut short: the compressed data ends too early") from None
        except (gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise ValueError(f"{path}: not sound {path.suffix.lower()} data: {error}") from None
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None


def _mapped(handle: IO[bytes]) -> ByteArray:
    return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "statewise"


def _check_split(split: Split) -> None:
    first, second = split if isinstance(split, tuple | list) and len(split) == 2 else (None, None)
    if isinstance(first, float) and isinstance(second, float):
        sound = first >= 0 and second >= 0 and _fraction(first) + _fraction(second) <= 1
    else:
        sound = type(first) is int and type(second) is int and 0 <= first <= second
    if not sound:
        raise ValueError(
            f"split: got {split!r}, accepted are two floats (the fractions that are train and valid, together at most "
            "1) or two ints (the byte offsets where train and valid end, in this order)"
        )


def _fraction(value: float) -> Fraction:
    """The decimal number that was meant: 0.9 + 0.05 is to be 0.95 exactly."""
    return Fraction(repr(float(value))) if np.isfinite(value) else Fraction(-1)


def _by_position(name: str, what: str, whole: ByteArray, split: Split) -> Corpus:
    first, second = split
    if isinstance(first, float):
        train = _character_edge(whole, int(_fraction(first) * len(whole)))
        valid = _character_edge(whole, int((_fraction(first) + _fraction(second)) * len(whole)))
    else:
        train, valid = first, int(second)
        if valid > len(whole):
            raise ValueError(f"split: got the offsets {split!r}, but {name} has {len(whole)} bytes")
    text = f"{what}: {len(whole):,} bytes, cut at the bytes {train:,} and {valid:,}"
    return Corpus(name, whole[:train], whole[train:valid], whole[valid:], text)


def _character_edge(whole: ByteArray, offset: int) -> int:
    """``offset``, or up to three bytes on where a UTF-8 character begins."""
    for ahead in range(min(4, len(whole) - offset)):
        if whole[offset + ahead] & 0xC0 != 0x80:
            return offset + ahead
    return len(whole) if 0 < len(whole) - offset < 4 else offset


def _parts_by_file(names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """0 (train), 1 (valid) or 2 (test) for each file, by the rule at the top."""
    share = _HELD_OUT * sum(sizes)
    parts = [0] * len(names)
    part, filled = 2, 0
    for index in sorted(range(len(names)), key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest()):
        if sizes[index] > share:
            continue
        if filled >= share:
            part, filled = part - 1, 0
        if part == 0:
            break
        parts[index] = part
        filled += sizes[index]
    return parts


def _folder(folder: Path, gather: _Gatherer, split: Split | None) -> Corpus:
    found = sorted(_walk(folder, lambda name: not name.startswith(".")))
    names = [name for name, size in found if size]
    sizes = [size for _, size in found if size]
    if not names:
        raise ValueError(f"{folder}: the folder holds no file with data in it")
    return _from_files(folder.resolve().name, f"{len(names)} files", folder, names, sizes, gather, split)


def _stdlib(gather: _Gatherer, split: Split | None) -> Corpus:
    folder = Path(sysconfig.get_path("stdlib"))
    found = sorted(_walk(folder, lambda name: name not in _STDLIB_LEFT_OUT))
    found = [(name, size) for name, size in found if name.endswith(".py") and size]
    readable = [(name, size) for name, size in found if os.access(folder / name, os.R_OK)]
    if not readable:
        raise ValueError(f"stdlib: this interpreter has no library source in {folder}")
    what = f"{platform.python_implementation()} {platform.python_version()}, {len(readable)} files of library source"
    if len(found) > len(readable):
        what += f" ({len(found) - len(readable)} could not be read)"
    return _from_files("stdlib", what, folder, [n for n, _ in readable], [s for _, s in readable], gather, split)


def _walk(folder: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, int]]:
    """(path relative to ``folder`` with forward slashes, size on disk) of every regular file, in no order."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = filter(wanted, folders)
        for name in filter(wanted, files):
            path = Path(place, name)
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.stat().st_size


def _from_files(
    name: str,
    what: str,
    folder: Path,
    names: Sequence[str],
    sizes: Sequence[int],
    gather: _Gatherer,
    split: Split | None,
) -> Corpus:
    by_file = split is None and (name == "stdlib" or len(names) >= _FILES_FOR_SPLIT_BY_FILE)
    parts = _parts_by_file(names, sizes) if by_file else [0] * len(names)
    train, valid, test = gather.files([folder / each for each in names], sizes, parts)
    if not len(train) + len(valid) + len(test):
        raise ValueError(f"{folder}: the files in the folder hold no data")
    if not by_file:
        return _by_position(name, what, train, split or _DEFAULT_SPLIT)
    counts = "/".join(str(parts.count(part)) for part in (0, 1, 2))
    text = f"{what}: {len(train) + len(valid) + len(test):,} bytes, split by file, {counts} in train/valid/test"
    return Corpus(name, train, valid, test, text)


def _enwik8(path: Path, gather: _Gatherer, split: Split | None) -> Corpus:
    if path.suffix == ".zip":
        whole = gather.join(enwik8.read_zip(path))
    else:
        whole = gather.file(path)
        for _ in enwik8.verified((whole[i : i + _BLOCK].tobytes() for i in range(0, len(whole), _BLOCK)), path):
            pass
    return _by_position("enwik8", "enwik8", whole, split or (enwik8.SIZE // 20 * 18, enwik8.SIZE // 20 * 19))
