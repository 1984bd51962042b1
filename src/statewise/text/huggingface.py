"""Hugging Face ``tokenizer.json`` through the optional package ``tokenizers``.

Almost all published recurrent models use byte-level BPE, whose tokens spell bytes in a 256-letter alphabet; for those
the bytes of each id are tabulated here, and streaming is exact. For the rest, streaming compares what the library makes
of a short window of ids with and without the newest.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from statewise.text.tokenizers import Decoder, PieceDecoder, as_id, as_utf8

__all__ = ["JsonTokenizer", "load_json"]

MAX_FILE_BYTES = 256 << 20
MAX_ID = 1 << 24
_MAX_HELD = 16  # ids; a character has at most four bytes, so a longer wait is for text that never becomes valid


def load_json(path: Path) -> JsonTokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ValueError: ``tokenizers`` is not installed, or the file is not one that it reads.
    """
    try:
        library_class = importlib.import_module("tokenizers").Tokenizer
    except ImportError:
        raise ValueError(
            f"{path}: a tokenizer.json needs the optional package tokenizers: `pip install 'statewise[text]'`"
        ) from None
    try:
        if os.path.getsize(path) > MAX_FILE_BYTES:
            raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
        content = path.read_bytes().decode("utf-8")
        library = library_class.from_str(content)
        byte_level = (json.loads(content).get("decoder") or {}).get("type") == "ByteLevel"
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception for a file it cannot read
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    try:
        return JsonTokenizer(library, path.name, byte_level=byte_level)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


class JsonTokenizer:
    """A ``tokenizer.json``. Special tokens are neither added by ``encode`` nor left out by ``decode``."""

    def __init__(self, library: Any, name: str, *, byte_level: bool) -> None:
        self._library = library
        self.name = name
        tokens: dict[str, int] = library.get_vocab(with_added_tokens=True)
        if not tokens:
            raise ValueError("the vocabulary is empty")
        self.vocab_size = max(tokens.values()) + 1
        if self.vocab_size > MAX_ID + 1:
            raise ValueError(f"id {self.vocab_size - 1} is not in 0..{MAX_ID}")
        # A file may bring the settings of a training run: text cut to a length, or filled up to one.
        library.no_truncation()
        library.no_padding()
        self.end_id = tokens.get("<|endoftext|>")
        self._ids = frozenset(tokens.values())
        self._pieces = {token: _spelled(text) for text, token in tokens.items()} if byte_level else None

    @property
    def unused_ids(self) -> frozenset[int]:
        return frozenset(range(self.vocab_size)) - self._ids

    def encode(self, text: str) -> list[int]:
        as_utf8(text)
        ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        if self._pieces is not None:
            return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")
        text: str = self._library.decode([self._checked(token) for token in ids], skip_special_tokens=False)
        return text

    def decoder(self) -> Decoder:
        return _WindowDecoder(self) if self._pieces is None else PieceDecoder(self._piece)

    def _checked(self, token: int) -> int:
        value = as_id(token, self.vocab_size)
        if value not in self._ids:
            raise ValueError(f"token id: {token} has no piece in the vocabulary {self.name!r}")
        return value

    def _piece(self, token: int) -> bytes:
        assert self._pieces is not None
        return self._pieces[self._checked(token)]


class _WindowDecoder:
    def __init__(self, tokenizer: JsonTokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []  # shown already, kept because what follows may depend on them
        self._held: list[int] = []

    def push(self, token: int) -> str:
        held = [*self._held, token]
        text = self._text(held)
        if (not text or text.endswith("\ufffd")) and len(held) < _MAX_HELD:
            self._held = held
            return ""
        self._before, self._held = held, []
        return text

    def finish(self) -> str:
        text = self._text(self._held)
        self._before, self._held = [], []
        return text

    def _text(self, held: list[int]) -> str:
        shown = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *held])[len(shown) :]


def _spelled(token: str) -> bytes:
    """The bytes a byte-level token spells; a token with any other letter (an added one) stands for itself."""
    try:
        return bytes(_LETTERS[letter] for letter in token)
    except KeyError:
        return token.encode("utf-8", errors="replace")


def _letters() -> dict[str, int]:
    # The published alphabet: printable Latin-1 stands for itself, the other 68 bytes follow from U+0100 in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()
