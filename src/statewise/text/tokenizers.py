"""Text to token ids and back, one character never torn in two.

Every tokenizer here is a table from ids to *pieces* (byte strings) in one direction and a rule for cutting bytes into
pieces in the other. A piece may end inside a character, so text that arrives one id at a time goes through a
:class:`Decoder`, which holds back an unfinished character until the rest of it arrives.
"""

from __future__ import annotations

import codecs
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

__all__ = ["ByteTokenizer", "Decoder", "PieceDecoder", "Tokenizer", "load_tokenizer"]


class Decoder(Protocol):
    """Text from ids that arrive one at a time; all that it returned, joined, equals ``Tokenizer.decode`` of all ids."""

    def push(self, token: int) -> str:
        """Take one id; return the text that is now certain (often, inside a character, ``""``).

        Raises:
            ValueError: the id is not an integer, lies outside the vocabulary, or is unused; the decoder is then as it
                was.
        """

    def finish(self) -> str:
        """Return what was held back, an unfinished character as U+FFFD, and start anew."""


class Tokenizer(Protocol):
    """What the rest of Statewise asks of a tokenizer."""

    @property
    def name(self) -> str:
        """``"bytes"``, ``"rwkv-world"``, or the name of the file it came from."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id. A model may have more rows; those have no text."""

    @property
    def unused_ids(self) -> frozenset[int]:
        """Ids below ``vocab_size`` that stand for nothing: ``decode`` refuses them, so they must not be sampled.

        An id that is read as nothing is not among them, such as RWKV's ``end_id``.
        """

    @property
    def end_id(self) -> int | None:
        """The id that ends a document: 0 in RWKV's vocabularies (where it decodes to nothing), ``<|endoftext|>`` in a
        ``tokenizer.json`` that has it; ``None`` where there is none."""

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, nothing added before or after; ``ValueError`` for what is not text."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, bytes that are not UTF-8 as U+FFFD; ``ValueError`` for an id outside the vocabulary
        and for an unused one."""

    def decoder(self) -> Decoder:
        """A fresh incremental decoder."""


def load_tokenizer(name: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of that name, or the one a file describes. Nothing in a file is ever run.

    Args:
        name: ``"bytes"``: ids are UTF-8 bytes, 256 of them. ``"rwkv-world"``: the vocabulary of the RWKV World models
            (65,529 pieces and id 0, the end of a document), taken from the installed package ``rwkv`` or
            ``pyrwkv-tokenizer``; the latter, where installed, encodes long texts 30 times as fast, to the same ids. A
            path: a vocabulary text file in RWKV's form, or a Hugging Face ``tokenizer.json``
            (or a folder with one; needs the optional package ``tokenizers``). Which of the two is seen from the
            contents. A ``pathlib.Path`` is always a path.

    Raises:
        ValueError: no such name or file, a file that is neither, or the package that is needed is not installed.
    """
    if name == "bytes":
        return ByteTokenizer()
    if name == "rwkv-world":
        from statewise.text.trie import find_world

        return find_world()
    path = Path(name)
    if path.is_dir() and (path / "tokenizer.json").is_file():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"tokenizer: {str(name)!r} is neither 'bytes', 'rwkv-world' nor a file")
    try:
        with open(path, "rb") as handle:
            is_json = handle.read(64).lstrip().startswith(b"{")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if is_json:
        from statewise.text.huggingface import load_json

        return load_json(path)
    from statewise.text.trie import load_vocabulary

    return load_vocabulary(path)


def as_id(token: object, vocab_size: int) -> int:
    """``token`` as an int in ``[0, vocab_size)``; anything with an integer value is taken, booleans are not."""
    try:
        value = -1 if isinstance(token, bool) else operator.index(token)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if not 0 <= value < vocab_size:
        raise ValueError(f"token id: got {token!r}, the vocabulary has the integers 0..{vocab_size - 1}")
    return value


def as_utf8(text: str) -> bytes:
    """``text`` as UTF-8; ``ValueError`` for what is not a string, and for a lone surrogate.

    Lone surrogates are how Python passes on bytes that were not UTF-8, in command-line arguments above all.
    """
    if not isinstance(text, str):
        raise ValueError(f"text: expected str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: not valid UTF-8 text: character {error.start} is the lone surrogate {text[error.start]!r}"
        ) from None


class PieceDecoder:
    """Joins pieces and gives out whole characters.

    Args:
        piece: the bytes of an id; raises ``ValueError`` for one outside the vocabulary.
    """

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._piece(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class ByteTokenizer:
    """An id is a byte of UTF-8."""

    name = "bytes"
    vocab_size = 256
    unused_ids: frozenset[int] = frozenset()
    end_id: int | None = None

    def encode(self, text: str) -> list[int]:
        return list(as_utf8(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, UTF-8 or not."""
        return list(data)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def decoder(self) -> Decoder:
        return PieceDecoder(self._piece)

    def _piece(self, token: int) -> bytes:
        return bytes((as_id(token, self.vocab_size),))
