"""Entropies against counting by hand, compressors against themselves run whole."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.text import compressor_bits_per_byte, load_corpus, order_entropy, yardsticks


def counted(data: bytes, order: int, model: bytes | None = None) -> float:
    """The definition, one byte at a time."""
    whole = data if model is None else model
    pairs = Counter((whole[i - order : i], whole[i]) for i in range(order, len(whole)))
    contexts: Counter[bytes] = Counter()
    for (context, _), times in pairs.items():
        contexts[context] += times
    extra, many = (0.0, 0.0) if model is None else (0.5, 128.0)
    bits = [
        -math.log2((pairs[data[i - order : i], data[i]] + extra) / (contexts[data[i - order : i]] + many))
        for i in range(order, len(data))
    ]
    return sum(bits) / len(bits)


@given(st.binary(min_size=2) | st.text("ab \n", min_size=2).map(str.encode), st.sampled_from([0, 1]), st.binary())
def test_entropy_is_its_definition(data: bytes, order: int, model: bytes) -> None:
    assert order_entropy(data, order) == pytest.approx(counted(data, order), abs=1e-12)
    assert order_entropy(data, order, given=model) == pytest.approx(counted(data, order, model), abs=1e-12)


def test_entropies_known_by_heart() -> None:
    every = bytes(range(256))
    assert order_entropy(every, 0) == 8
    assert order_entropy(every * 3, 1) == 0
    assert order_entropy(b"aaaa", 0) == 0
    assert order_entropy(b"abab", 0) == 1
    assert order_entropy(b"abab", 1) == 0
    assert order_entropy(b"abba", 1) == pytest.approx(2 / 3)
    assert order_entropy(every, 0, given=b"") == 8


@pytest.mark.parametrize("order", [0, 1])
def test_counting_in_blocks_misses_no_byte_and_no_pair(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 7, 1000, dtype=np.uint8)
    expected = order_entropy(data, order)
    for block in (1, 7, 999, 1000):
        monkeypatch.setattr(yardsticks, "_BLOCK", block)
        assert order_entropy(data, order) == expected


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda data: np.frombuffer(data, np.uint8)])
def test_all_kinds_of_bytes(kind: Any) -> None:
    assert order_entropy(kind(b"abba"), 1) == order_entropy(b"abba", 1)
    assert compressor_bits_per_byte(kind(b"abba")) == compressor_bits_per_byte(b"abba")


@pytest.mark.parametrize(
    ("data", "order", "reason"),
    [
        (b"", 0, "data: got 0 bytes"),
        (b"a", 1, "data: got 1 bytes, an entropy of order 1 needs at least 2"),
        (b"aa", 2, "order: got 2"),
        (np.zeros(4, np.int64), 0, "data: expected bytes or a uint8 vector, got int64"),
        (np.zeros((2, 2), np.uint8), 0, "data: expected bytes or a uint8 vector"),
    ],
)
def test_entropy_of_nothing(data: Any, order: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        order_entropy(data, order)


def test_compressors_are_the_usual_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(load_corpus("stdlib").test[:300_000])
    expected = {
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "bzip2": 8 * len(bz2.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }
    assert compressor_bits_per_byte(data) == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr(yardsticks, "_BLOCK", 1000)
    assert compressor_bits_per_byte(data) == pytest.approx(expected, rel=1e-4)
    assert compressor_bits_per_byte(data + b"more", limit=len(data)) == compressor_bits_per_byte(data)


def test_compressors_refuse_nothing_and_less() -> None:
    with pytest.raises(ValueError, match="data: got 0 bytes"):
        compressor_bits_per_byte(b"")
    with pytest.raises(ValueError, match="limit: got 0"):
        compressor_bits_per_byte(b"a", limit=0)


def test_published_yardsticks(shared: Path) -> None:
    published = json.loads((shared / "data/text/compressors.json").read_text())["tinyshakespeare"]
    corpus = load_corpus(shared / "data/text/tinyshakespeare.txt", split=(published["test_offset"],) * 2)
    ours = compressor_bits_per_byte(corpus.test)
    for name, theirs in (("gzip", "gzip -9"), ("bzip2", "bzip2 -9"), ("xz", "xz -9e")):
        assert ours[name] == pytest.approx(published["bpb"][theirs]["test_alone"], abs=1e-3)
