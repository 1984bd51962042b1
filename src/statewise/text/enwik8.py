"""enwik8: the first 100,000,000 bytes of an English Wikipedia dump, http://mattmahoney.net/dc/textdata.html.

Whatever way it comes, as a file, a zip or a download, it is used only if size and SHA-1 are the published ones.
"""

from __future__ import annotations

import hashlib
import http.client
import lzma
import re
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from statewise.files import atomic_write

__all__ = ["URL", "find", "read_zip", "verified"]

URL = "http://mattmahoney.net/dc/enwik8.zip"
SIZE = 100_000_000
SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"

TIMEOUT_S = 30.0
_BLOCK = 1 << 16
# What zipfile raises for a damaged, empty, encrypted or otherwise compressed file, and for one without the member.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, KeyError, RuntimeError, OSError)

Progress = Callable[[int, int | None], None]


def find(folder: Path, url: str, progress: Progress | None) -> Path:
    """A local ``enwik8`` or ``enwik8.zip``, from ``folder``, else from the current folder, else downloaded.

    A download goes to ``folder/enwik8.zip.part``, which stays there if it breaks off and is continued by the next
    call; once whole, it is unpacked to ``folder/enwik8``, checked on the way, and removed.

    Returns:
        Where it lies; what was there before the call is not checked yet.
    """
    for place in (folder, Path()):
        for name in ("enwik8", "enwik8.zip"):
            if (place / name).is_file():
                return place / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache_dir: {folder} cannot be made: {error.strerror}") from None
    part = folder / "enwik8.zip.part"
    _download(url, part, progress)
    target = folder / "enwik8"

    def unpack(temporary: Path) -> None:
        with open(temporary, "wb") as out:
            for block in read_zip(part):
                out.write(block)

    try:
        atomic_write(target, unpack)
    except ValueError as error:
        part.unlink()  # continuing a wrong file would never make it right
        raise ValueError(f"{url}: what was downloaded is not enwik8, and was removed: {error}") from None
    part.unlink()
    return target


def verified(blocks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Pass ``blocks`` on; at the end (or once there are too many) ``ValueError`` unless they were enwik8."""
    digest, size = hashlib.sha1(usedforsecurity=False), 0
    for block in blocks:
        digest.update(block)
        size += len(block)
        if size > SIZE:
            break
        yield block
    if size != SIZE or digest.hexdigest() != SHA1:
        more = "more than " if size > SIZE else ""
        raise ValueError(
            f"{path}: not enwik8, whose {SIZE} bytes have the SHA-1 {SHA1}: got {more}{min(size, SIZE)} bytes with "
            f"{digest.hexdigest()}; give another file another name"
        )


def read_zip(path: Path) -> Iterator[bytes]:
    """The verified contents of the member ``enwik8`` of a zip file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("enwik8") as member:
            yield from verified(iter(lambda: member.read(_BLOCK), b""), path)
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path}: not a zip file with enwik8 in it: {error}") from None


def _download(url: str, part: Path, progress: Progress | None) -> None:
    """Fill ``part``, starting from what it holds; tries again as long as each try brings something."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url: expected http:// or https://, got {url!r}")
    while True:
        before = part.stat().st_size if part.exists() else 0
        reason = _continue(url, part, before, progress)
        if reason is None:
            return
        have = part.stat().st_size if part.exists() else 0
        if have <= before:
            raise ValueError(f"{url}: {reason}; {have} bytes are kept in {part}, and the next try goes on from there")


def _continue(url: str, part: Path, start: int, progress: Progress | None) -> str | None:
    """One request. Returns None when ``part`` is whole, else why it is not; errors of the disk pass through."""
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "statewise"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416 or not start:
                return f"the server answers {error.code} {error.reason}"
            if error.headers.get("Content-Range") == f"bytes */{start}":
                return None  # whole already: the last call was stopped before unpacking
        return _continue(url, part, 0, progress)
    except urllib.error.URLError as error:
        return f"cannot be reached: {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        return f"no answer: {error!r}"
    with response:
        total = _total(response, start)
        if total is None and response.status == 206:
            return f"the server sent another range than was asked for: {response.headers['Content-Range']}"
        # 200 to a request for a range: the server cannot continue, and sends everything anew.
        position = start if response.status == 206 else 0
        with open(part, "r+b" if position else "wb") as out:
            out.seek(position)
            while block := _read(response):
                position += len(block)
                if position > SIZE:
                    part.unlink()
                    raise ValueError(f"{url}: not enwik8: longer than {SIZE} bytes; what was downloaded was removed")
                out.write(block)
                if progress is not None:
                    progress(position, total)
    if total is not None and position < total:
        return f"the connection was cut after {position} of {total} bytes"
    return None


def _read(response: http.client.HTTPResponse) -> bytes:
    """The next block; empty at the end, and also where the connection breaks (the caller compares sizes)."""
    try:
        return response.read(_BLOCK)
    except (OSError, http.client.IncompleteRead):
        return b""


def _total(response: http.client.HTTPResponse, start: int) -> int | None:
    """Bytes of the whole file, if the server says; None too if it continues elsewhere than at ``start``."""
    if response.status != 206:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdecimal() else None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return int(span[2]) if span and int(span[1]) == start else None
