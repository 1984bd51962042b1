"""Tokens to train on, and the order in which they are read.

Both orders are functions of a batch's number alone, so a run that continues needs no more than its step. Windows are
visited in a pseudo-random permutation that is computed, not stored; streams are read from end to end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from statewise.files import atomic_write
from statewise.text import Tokenizer, decode_text, load_corpus, load_tokenizer
from statewise.training.config import TrainConfig

__all__ = ["Batch", "Batches", "Streams", "TokenizedText", "Windows", "load_tokens", "permute"]

Tokens: TypeAlias = npt.NDArray[Any]

_MASK = (1 << 64) - 1
_ROUNDS = 6
_PIECE = 1 << 20


class TokenizedText(NamedTuple):
    """The two parts a run reads, as ids, and how many bytes of text they stand for.

    ``sha256`` is that of both arrays: a run continues only on the tokens it began with.
    """

    train: Tokens
    valid: Tokens
    train_bytes: int
    valid_bytes: int
    vocab_size: int
    sha256: str


def load_tokens(config: TrainConfig, cache: Path) -> TokenizedText:
    """Open the corpus of a run.

    Args:
        config: its ``data``, ``split`` and ``tokenizer`` are used.
        cache: directory for ids of tokenizers other than ``"bytes"`` (whose ids are the text itself); made if needed.

    Raises:
        ValueError: no such corpus or tokenizer, or text that is not UTF-8 where the tokenizer needs characters.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = load_corpus(config.data, split=config.split)
    parts: list[Tokens] = [corpus.train, corpus.valid]
    if config.tokenizer != "bytes":
        parts = [_encode_cached(part, tokenizer, config, cache) for part in parts]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part.dtype.str} {len(part)} ".encode())
        digest.update(part.data)
    train, valid = parts
    return TokenizedText(train, valid, len(corpus.train), len(corpus.valid), tokenizer.vocab_size, digest.hexdigest())


def _encode_cached(part: npt.NDArray[np.uint8], tokenizer: Tokenizer, config: TrainConfig, cache: Path) -> Tokens:
    """The ids of ``part``, memory-mapped from a file named after the text and the tokenizer."""
    key = hashlib.sha256(config.tokenizer.encode("utf-8", "surrogateescape"))
    table = Path(config.tokenizer)
    table = table / "tokenizer.json" if table.is_dir() else table
    if table.is_file():
        key.update(table.read_bytes())
    key.update(part.data)
    path = cache / f"{key.hexdigest()}.npy"
    if not path.is_file():
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        pieces = [np.asarray(tokenizer.encode(text), dtype) for text in _texts(part, config.data)]
        whole = np.concatenate([np.zeros(0, dtype), *pieces])
        cache.mkdir(parents=True, exist_ok=True)

        def fill(temporary: Path) -> None:
            with open(temporary, "wb") as handle:
                np.save(handle, whole, allow_pickle=False)

        atomic_write(path, fill)
    try:
        found: Tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"{path}: not an array of tokens ({error}); remove it to have the text encoded again"
        ) from error
    return found


def _texts(part: npt.NDArray[np.uint8], source: str | os.PathLike[str]) -> Iterator[str]:
    """The text in pieces of about 1 MiB that end after a line feed: tokenizers take strings, a corpus may be large."""
    start = 0
    while start < len(part):
        stop = start + _PIECE
        while stop < len(part):
            line_feeds = np.flatnonzero(part[stop : stop + _PIECE] == 10)
            if len(line_feeds):
                stop += int(line_feeds[0]) + 1
                break
            stop += _PIECE
        stop = min(stop, len(part))
        yield decode_text(part[start:stop], source)
        start = stop


class Batch(NamedTuple):
    """``inputs`` and ``targets`` ``(B, T)`` int64, targets one token ahead; ``fresh``: a carried state starts anew."""

    inputs: Tensor
    targets: Tensor
    fresh: bool


class Batches(Protocol):
    """An order: batch ``index`` (0, 1, ...) of a run, without end."""

    def read(self, index: int) -> Batch: ...

    def epoch(self, index: int) -> float:
        """How often the text has been read before batch ``index``."""


def _mix(*values: int) -> int:
    """A 64-bit hash of integers (the finaliser of SplitMix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state + (value & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(position: int, size: int, key: int) -> int:
    """Where ``position`` goes in the permutation of ``0..size-1`` chosen by ``key``; no memory, any size.

    A Feistel network permutes the next power of four; walking it until the value falls below ``size`` permutes that.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(key, turn, right) & mask)
        value = left << half | right
        if value < size:
            return value


class Windows:
    """Windows of ``context + 1`` tokens, each once an epoch, in an order that every epoch draws anew.

    A text rarely divides evenly: every epoch begins at an offset drawn from what is left over.

    Raises:
        ValueError: the text is shorter than one window.
    """

    def __init__(self, tokens: Tokens, *, batch_size: int, context: int, seed: int) -> None:
        if len(tokens) <= context:
            raise ValueError(
                f"data has {len(tokens)} tokens to train on; context {context} needs at least {context + 1}"
            )
        self._tokens, self._rows, self._context, self._seed = tokens, batch_size, context, seed
        self._count = (len(tokens) - 1) // context
        self._slack = len(tokens) - 1 - self._count * context

    def starts(self, index: int) -> list[int]:
        """First token of every row of batch ``index``."""
        found = []
        for position in range(index * self._rows, (index + 1) * self._rows):
            epoch, within = divmod(position, self._count)
            key = _mix(self._seed, epoch)
            found.append(key % (self._slack + 1) + permute(within, self._count, key) * self._context)
        return found

    def read(self, index: int) -> Batch:
        return _gather(self._tokens, self.starts(index), self._context, fresh=True)

    def epoch(self, index: int) -> float:
        return index * self._rows / self._count


class Streams:
    """``batch_size`` equal pieces of the text, one a row, each read from its start to its end and then again.

    Raises:
        ValueError: the text is shorter than one window a row.
    """

    def __init__(self, tokens: Tokens, *, batch_size: int, context: int, seed: int) -> None:
        needed = batch_size * context + 1
        if len(tokens) < needed:
            raise ValueError(
                f"data has {len(tokens)} tokens to train on; with carry_state, batch_size {batch_size} and context "
                f"{context} need at least {needed}"
            )
        self._tokens, self._rows, self._context, self._seed = tokens, batch_size, context, seed
        self._count = (len(tokens) - 1) // (batch_size * context)
        self._slack = len(tokens) - 1 - self._count * batch_size * context

    def starts(self, index: int) -> list[int]:
        """First token of every row of batch ``index``."""
        epoch, within = divmod(index, self._count)
        offset = _mix(self._seed, epoch) % (self._slack + 1)
        return [offset + (row * self._count + within) * self._context for row in range(self._rows)]

    def read(self, index: int) -> Batch:
        return _gather(self._tokens, self.starts(index), self._context, fresh=index % self._count == 0)

    def epoch(self, index: int) -> float:
        return index / self._count


def _gather(tokens: Tokens, starts: list[int], context: int, *, fresh: bool) -> Batch:
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    whole = torch.from_numpy(rows)
    return Batch(whole[:, :-1].contiguous(), whole[:, 1:].contiguous(), fresh)
