"""RWKV's "World" tokenizer: at every byte, take the longest piece of the vocabulary that fits, and go on after it.

The vocabulary is a text file, one piece a line: ``ID LITERAL LENGTH``, where LITERAL is a Python string (whose piece is
its UTF-8) or bytes literal, and LENGTH counts the piece's bytes. The pieces hang in a trie of dictionaries: a node maps
the next byte to a node, and ``_ID`` to the id of the piece that ends there. Walking it is the fastest form measured in
plain Python: two and a half times looking slices up by length.

Where the compiled package ``pyrwkv-tokenizer`` is installed, it encodes long texts in the published vocabulary, to the
same ids. It is asked for nothing else: it decodes by panicking on half a character, and knows no bytes that are not
UTF-8.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from statewise.text.tokenizers import Decoder, PieceDecoder, as_id, as_utf8

__all__ = ["TrieTokenizer", "find_world", "load_vocabulary"]

WORLD_FILE = "rwkv_vocab_v20230424.txt"
WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"  # with LF line ends
WORLD_PACKAGES = {"rwkv": "rwkv", "pyrwkv_tokenizer": "pyrwkv-tokenizer"}

MAX_FILE_BYTES = 64 << 20
MAX_LINE_BYTES = 8 << 10  # the longest line of the World vocabulary has 140
MAX_ID = 1 << 20
# Loading the compiled package takes as long as encoding this many bytes here.
BYTES_WORTH_LOADING = 1 << 20

_ID = -1  # beside byte values as keys of a node
_Node = dict[int, Any]


class TrieTokenizer:
    """Greedy longest match over byte strings; lossless on any bytes.

    Args:
        pieces: the byte string of each id. Must hold all 256 single bytes, so that everything can be encoded. Id 0 is
            the end of a document, has no piece and decodes to nothing.
        name: what it is called.
        is_world: whether these are the pieces of the published World vocabulary, which another package knows too.
    """

    def __init__(self, pieces: dict[int, bytes], name: str, *, is_world: bool = False) -> None:
        missing = set(range(256)) - {piece[0] for piece in pieces.values() if len(piece) == 1}
        if missing:
            raise ValueError(f"no piece for the single byte 0x{min(missing):02x}: not all text could be encoded")
        self.name = name
        self.vocab_size = max(pieces) + 1
        self._pieces = {0: b"", **pieces}
        self._is_world = is_world
        self._encoded = 0  # bytes so far
        self._root: _Node = {}
        for token, piece in pieces.items():
            node = self._root
            for byte in piece:
                node = node.setdefault(byte, {})
            node[_ID] = token

    def encode(self, text: str) -> list[int]:
        data = as_utf8(text)
        self._encoded += len(data)
        if self._encoded >= BYTES_WORTH_LOADING and self._compiled is not None:
            return self._compiled(text)
        return self.encode_bytes(data)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not; 5 to 8 MB/s."""
        ids: list[int] = []
        root, start, length = self._root, 0, len(data)
        token = end = 0
        while start < length:
            node: _Node | None = root
            position = start
            while node is not None:
                if _ID in node:
                    token, end = node[_ID], position
                if position == length:
                    break
                node = node.get(data[position])
                position += 1
            ids.append(token)
            start = end
        return ids

    @property
    def end_id(self) -> int | None:
        return 0

    @property
    def unused_ids(self) -> frozenset[int]:
        return frozenset(range(self.vocab_size)) - self._pieces.keys()

    @cached_property
    def _compiled(self) -> Callable[[str], list[int]] | None:
        return _compiled_world() if self._is_world else None

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        return PieceDecoder(self._piece)

    def _piece(self, token: int) -> bytes:
        piece = self._pieces.get(as_id(token, self.vocab_size))
        if piece is None:
            raise ValueError(f"token id: {token} has no piece in the vocabulary {self.name!r}")
        return piece


def load_vocabulary(path: Path) -> TrieTokenizer:
    """Read a vocabulary text file (line ends may be LF or CRLF).

    Raises:
        ValueError: the file is too large, or a line is not ``ID LITERAL LENGTH``, contradicts itself or another line;
            says which.
    """
    return _parse(path, path.name)


def find_world() -> TrieTokenizer:
    """The RWKV World vocabulary out of an installed package, which is looked at but not imported.

    Raises:
        ValueError: no such package, or its file is not the published vocabulary.
    """
    for module in WORLD_PACKAGES:
        found = importlib.util.find_spec(module)
        for folder in (found.submodule_search_locations if found else None) or ():
            path = Path(folder) / WORLD_FILE
            if path.is_file():
                return _parse(path, "rwkv-world", WORLD_SHA256)
    raise ValueError(
        f"tokenizer 'rwkv-world': the vocabulary {WORLD_FILE} comes with the packages "
        f"{' and '.join(WORLD_PACKAGES.values())}, and neither is installed: `pip install rwkv`, or give the path of "
        "the file instead"
    )


def _compiled_world() -> Callable[[str], list[int]] | None:
    """``encode`` of the compiled package, if it is here and reads the published vocabulary, byte for byte."""
    try:
        package = importlib.import_module("pyrwkv_tokenizer")
    except ImportError:
        return None
    file = Path(str(package.__file__)).with_name(WORLD_FILE)
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != WORLD_SHA256:
        return None
    encode: Callable[[str], list[int]] = package.WorldTokenizer(str(file)).encode
    return encode


def _parse(path: Path, name: str, sha256: str | None = None) -> TrieTokenizer:
    try:
        with open(path, "rb") as handle:
            content = handle.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than {MAX_FILE_BYTES} bytes: not a vocabulary")
    content = content.replace(b"\r\n", b"\n")
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise ValueError(f"{path}: not the published vocabulary: its sha256 (with LF line ends) is not {sha256}")
    pieces: dict[int, bytes] = {}
    ids: dict[bytes, int] = {}
    for number, line in enumerate(content.rstrip(b"\n").split(b"\n"), 1):
        try:
            token, piece = _parse_line(line)
            if token in pieces or piece in ids:
                raise ValueError(f"id {token} or its piece was already given")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        pieces[token] = piece
        ids[piece] = token
    try:
        return TrieTokenizer(pieces, name, is_world=found == WORLD_SHA256)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse_line(line: bytes) -> tuple[int, bytes]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        head, rest = line.decode("utf-8").split(" ", 1)
        literal, tail = rest.rsplit(" ", 1)
        token, size = int(head), int(tail)
    except ValueError:
        raise ValueError(f"expected ID LITERAL LENGTH, got {line[:80]!r}") from None
    if not 1 <= token <= MAX_ID:
        raise ValueError(f"id {token} is not in 1..{MAX_ID}")
    quote = literal[:1]
    if quote in ("'", '"') and literal.find(quote, 1) == len(literal) - 1 and "\\" not in literal:
        value: object = literal[1:-1]  # nothing to unescape; nine lines of ten, and many times quicker
    else:
        try:
            value = ast.literal_eval(literal)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{literal[:80]!r} is not a string or bytes literal") from None
    if isinstance(value, str):
        value = as_utf8(value)
    if not isinstance(value, bytes):
        raise ValueError(f"{literal[:80]!r} is not a string or bytes literal")
    if not value or len(value) != size:
        raise ValueError(f"the piece has {len(value)} bytes, the line says {size}, and at least 1 is needed")
    return token, value
