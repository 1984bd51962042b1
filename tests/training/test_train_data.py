"""The order of the data: a permutation every epoch, streams without a gap, no memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.training import TrainConfig
from statewise.training.data import Streams, Windows, load_tokens, permute


@given(size=st.integers(1, 300), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert sorted(permute(position, size, key) for position in range(size)) == list(range(size))


def test_permute_mixes() -> None:
    """Neighbours part, keys differ, and a huge domain costs nothing."""
    size = 10_000
    order = np.array([permute(position, size, 1) for position in range(size)])
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(order)) == 1) < 0.001
    assert np.mean(order == [permute(position, size, 2) for position in range(size)]) < 0.001
    assert len({permute(position, 10**15, 3) for position in range(100)}) == 100


@settings(max_examples=60)
@given(num_tokens=st.integers(2, 400), context=st.integers(1, 30), rows=st.integers(1, 7), seed=st.integers(0, 5))
def test_windows_visit_everything_once_an_epoch(num_tokens: int, context: int, rows: int, seed: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    if num_tokens <= context:
        with pytest.raises(ValueError, match=f"data has {num_tokens} tokens .* needs at least {context + 1}"):
            Windows(tokens, batch_size=rows, context=context, seed=seed)
        return
    order = Windows(tokens, batch_size=rows, context=context, seed=seed)
    count = (num_tokens - 1) // context
    starts = [start for index in range(-(-2 * count // rows)) for start in order.starts(index)][: 2 * count]
    for epoch in (starts[:count], starts[count:]):
        offset = min(epoch)
        assert sorted(epoch) == [offset + i * context for i in range(count)]
        assert offset + count * context < num_tokens
    batch = order.read(1)
    assert batch.fresh
    assert batch.inputs.shape == (rows, context)
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert batch.inputs[:, 0].tolist() == order.starts(1)


def test_windows_depend_on_seed_and_epoch_alone() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    first, again, other = (Windows(tokens, batch_size=4, context=10, seed=seed) for seed in (0, 0, 1))
    assert [first.starts(i) for i in (90, 3, 7)] == [again.starts(i) for i in (90, 3, 7)]
    assert first.starts(0) != other.starts(0)
    epochs = [[start // 10 for i in range(e * 99, (e + 1) * 99) for start in first.starts(i)][:99] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert first.epoch(99) == pytest.approx(4.0)


@settings(max_examples=60)
@given(num_tokens=st.integers(2, 400), context=st.integers(1, 20), rows=st.integers(1, 6))
def test_streams_run_on_without_a_gap(num_tokens: int, context: int, rows: int) -> None:
    tokens = np.arange(num_tokens, dtype=np.uint16)
    needed = rows * context + 1
    if num_tokens < needed:
        with pytest.raises(ValueError, match=f"need at least {needed}"):
            Streams(tokens, batch_size=rows, context=context, seed=0)
        return
    order = Streams(tokens, batch_size=rows, context=context, seed=0)
    count = (num_tokens - 1) // (rows * context)
    batches = [order.read(index) for index in range(2 * count)]
    assert [batch.fresh for batch in batches] == ([True] + [False] * (count - 1)) * 2
    for epoch in (batches[:count], batches[count:]):
        read = torch.cat([batch.inputs for batch in epoch], dim=1)
        assert torch.equal(read, read[:, :1] + torch.arange(count * context))
        assert len(read.unique()) == read.numel()
        assert torch.equal(torch.cat([batch.targets for batch in epoch], dim=1), read + 1)


def test_bytes_are_the_text(tmp_path: Path) -> None:
    text = bytes(range(256)) * 4
    (tmp_path / "a.bin").write_bytes(text)
    got = load_tokens(TrainConfig(data=str(tmp_path / "a.bin"), split=(900, 1000)), tmp_path / "cache")
    assert got.train.tobytes() + got.valid.tobytes() == text[:1000]
    assert (got.train_bytes, got.valid_bytes, got.vocab_size) == (900, 100, 256)
    assert not (tmp_path / "cache").exists()
    moved = load_tokens(TrainConfig(data=str(tmp_path / "a.bin"), split=(901, 1000)), tmp_path / "cache")
    assert moved.sha256 != got.sha256


def write_vocabulary(path: Path) -> None:
    pieces = [bytes((i,)) for i in range(256)] + [b"ab", "é".encode(), b"ca"]
    path.write_text("".join(f"{i} {p!r} {len(p)}\n" for i, p in enumerate(pieces, start=1)), "utf-8")


def test_other_tokens_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from statewise.text import load_tokenizer
    from statewise.training import data

    monkeypatch.setattr(data, "_PIECE", 5)  # many pieces: the cut after a line feed must not show
    write_vocabulary(tmp_path / "vocab.txt")
    text = "abc\nab\nécab\nbbb\naab\n" * 3
    (tmp_path / "a.txt").write_text(text, "utf-8")
    size = len(text.encode())
    config = TrainConfig(data=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "vocab.txt"), split=(size - 4, size))
    first = load_tokens(config, tmp_path / "cache")
    tokenizer = load_tokenizer(config.tokenizer)
    assert tokenizer.decode(first.train.tolist()) + tokenizer.decode(first.valid.tolist()) == text
    assert first.train.dtype == np.uint16
    assert (first.train_bytes, first.valid_bytes) == (size - 4, 4)

    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 2
    monkeypatch.setattr(data, "_texts", lambda *arguments: pytest.fail("encoded again"))
    assert load_tokens(config, tmp_path / "cache").sha256 == first.sha256
    files[0].write_bytes(b"not an array")
    with pytest.raises(ValueError, match="not an array of tokens"):
        load_tokens(config, tmp_path / "cache")


def test_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write_vocabulary(tmp_path / "vocab.txt")
    (tmp_path / "a.txt").write_bytes(b"ab\xff" * 30)
    config = TrainConfig(data=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "vocab.txt"))
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 text"):
        load_tokens(config, tmp_path / "cache")
