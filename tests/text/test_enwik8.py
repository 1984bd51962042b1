"""enwik8 from a file, a zip and a server that does what servers do; a small text stands in for the real one."""

from __future__ import annotations

import hashlib
import io
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from statewise.text import Corpus, enwik8, load_corpus

TEXT = np.random.default_rng(8).integers(97, 123, 400_000, dtype=np.uint8).tobytes()


def zipped(content: bytes, name: str = "enwik8", method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr(name, content)
    return out.getvalue()


ZIP = zipped(TEXT)


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``cut`` bytes a request and no more, ranges or not; remembers what it was asked."""

    content = ZIP
    cut: int | None = None
    ranges = True
    wrong_range = False
    endless = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/enwik8.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        content = self.server.content
        if self.path != "/enwik8.zip":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.ranges else 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if asked and self.server.ranges else 200)
        if asked and self.server.ranges:
            told = start + 1 if self.server.wrong_range else start
            self.send_header("Content-Range", f"bytes {told}-{len(content) - 1}/{len(content)}")
        if not self.server.endless:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.server.cut
        self.wfile.write(content[start : None if cut is None else start + cut])
        while self.server.endless:
            self.wfile.write(bytes(1 << 16))

    def log_message(self, *args: Any) -> None:
        """Not on the test's terminal."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(enwik8, "SIZE", len(TEXT))
    monkeypatch.setattr(enwik8, "SHA1", hashlib.sha1(TEXT).hexdigest())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def check(corpus: Corpus) -> None:
    assert corpus.name == "enwik8"
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [360_000, 20_000, 20_000]
    assert b"".join(part.tobytes() for part in (corpus.train, corpus.valid, corpus.test)) == TEXT


def test_the_published_figures() -> None:
    source = Path(enwik8.__file__).read_text()
    assert "SIZE = 100_000_000" in source
    assert 'SHA1 = "57b8363b814821dc9d47aa4d41f58733519076b2"' in source


@pytest.mark.parametrize("name", ["enwik8", "enwik8.zip"])
@pytest.mark.parametrize("place", ["cache", "here", "path"])
def test_a_local_copy(name: str, place: str, tmp_path: Path) -> None:
    folder = {"cache": tmp_path / "cache", "here": Path.cwd(), "path": tmp_path / "elsewhere"}[place]
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(TEXT if name == "enwik8" else ZIP)
    check(
        load_corpus(folder / name if place == "path" else "enwik8", cache_dir=tmp_path / "cache", url="http://[::]:0/")
    )


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("enwik8", TEXT[:-1], "got 399999 bytes"),
        ("enwik8", TEXT + b"x", "got more than 400000 bytes"),
        ("enwik8", b"X" + TEXT[1:], "got 400000 bytes with"),
        ("enwik8.zip", zipped(b"X" + TEXT[1:]), "got 400000 bytes with"),
        ("enwik8.zip", zipped(TEXT * 20), "got more than 400000 bytes"),
        ("enwik8.zip", zipped(TEXT, "other"), "not a zip file with enwik8 in it"),
        ("enwik8.zip", ZIP[:-100], "not a zip file with enwik8 in it"),
        ("enwik8.zip", ZIP[:1000] + b"\xff" * 5000 + ZIP[6000:], "not a zip file with enwik8 in it"),
        ("enwik8.zip", b"", "not a zip file with enwik8 in it"),
    ],
)
def test_a_wrong_copy_is_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}: .*{reason}"):
        load_corpus(path)


def test_an_endless_member_is_not_unpacked_to_its_end(tmp_path: Path) -> None:
    blocks = iter([TEXT] * 1000)
    with pytest.raises(ValueError, match="got more than 400000 bytes"):
        list(enwik8.verified(blocks, tmp_path / "enwik8.zip"))
    assert len(list(blocks)) == 998


def test_a_split_given_holds_for_enwik8_too(tmp_path: Path) -> None:
    (tmp_path / "enwik8").write_bytes(TEXT)
    assert len(load_corpus(tmp_path / "enwik8", split=(0.5, 0.25)).train) == 200_000


def test_download(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    cache = tmp_path / "new" / "cache"
    corpus = load_corpus(
        "enwik8", cache_dir=cache, url=server.url, progress=lambda done, total: seen.append((done, total))
    )
    check(corpus)
    assert [path.name for path in cache.iterdir()] == ["enwik8"]
    assert (len(ZIP), len(ZIP)) in seen
    check(load_corpus("enwik8", cache_dir=cache, url=server.url))
    assert server.asked == [None], "the second time it is there"


def test_the_default_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    check(load_corpus("enwik8", url=server.url))
    assert (tmp_path / "xdg" / "statewise" / "enwik8").is_file()


def test_a_cut_connection_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cut = 100_000
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"][: len(server.asked)]
    assert len(server.asked) == -(-len(ZIP) // 100_000) > 1


def test_a_dead_server_leaves_the_part_and_the_next_call_goes_on(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "enwik8.zip.part"
    part.write_bytes(ZIP[:1234])
    server.cut = 0
    with pytest.raises(ValueError, match=f"cut after 1234 of {len(ZIP)} bytes; 1234 bytes are kept in {part}"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert part.read_bytes() == ZIP[:1234]
    server.cut = None
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))
    assert server.asked == ["bytes=1234-", "bytes=1234-"]
    assert not part.exists()


def test_a_server_without_ranges_starts_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(b"\xff" * 5000)
    server.ranges = False
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))
    assert server.asked == ["bytes=5000-"]


def test_a_server_that_cuts_and_has_no_ranges_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cut = False, 5000
    with pytest.raises(ValueError, match=f"cut after 5000 of {len(ZIP)} bytes"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert len(server.asked) == 2


def test_a_whole_part_only_needs_unpacking(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(ZIP)
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))
    assert server.asked == [f"bytes={len(ZIP)}-"]


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(ZIP + b"more")
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))
    assert server.asked[-1] is None


def test_a_server_with_nothing_to_give_is_given_up(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(ZIP)
    server.content = b""
    with pytest.raises(ValueError, match="the server answers 416"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert server.asked == [f"bytes={len(ZIP)}-", None]


@pytest.mark.parametrize("content", [zipped(b"X" + TEXT[1:]), b"<html>no</html>"], ids=["checksum", "not a zip"])
def test_a_wrong_download_is_removed(content: bytes, server: Server, tmp_path: Path) -> None:
    server.content = content
    with pytest.raises(ValueError, match="what was downloaded is not enwik8, and was removed"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    server.content = ZIP
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))


def test_a_wrong_part_is_found_out(server: Server, tmp_path: Path) -> None:
    (tmp_path / "enwik8.zip.part").write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match="what was downloaded is not enwik8, and was removed"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    check(load_corpus("enwik8", cache_dir=tmp_path, url=server.url))


def test_another_range_than_asked_for_is_not_taken(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "enwik8.zip.part"
    part.write_bytes(ZIP[:1000])
    server.wrong_range = True
    with pytest.raises(ValueError, match="another range than was asked for: bytes 1001-"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert part.read_bytes() == ZIP[:1000]


def test_an_endless_answer_cannot_fill_the_disk(server: Server, tmp_path: Path) -> None:
    server.endless = True
    with pytest.raises(ValueError, match="not enwik8: longer than 400000 bytes"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url)
    assert not (tmp_path / "enwik8.zip.part").exists()


def test_nobody_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the server answers 404"):
        load_corpus("enwik8", cache_dir=tmp_path, url=server.url + "x")
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:1/: cannot be reached"):
        load_corpus("enwik8", cache_dir=tmp_path, url="http://127.0.0.1:1/")
    for url in ("file:///etc/hostname", "ftp://127.0.0.1/enwik8.zip", "enwik8.zip"):
        with pytest.raises(ValueError, match="url: expected http:// or https://"):
            load_corpus("enwik8", cache_dir=tmp_path, url=url)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cache_dir: .*file/cache cannot be made"):
        load_corpus("enwik8", cache_dir=tmp_path / "file" / "cache", url=server.url)
