"""``generate``: text streamed whole, continued exactly, and every mistake told in one line."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import statewise

Command = Callable[..., Any]

GREEDY = ("--temperature", "0")


def test_writes_what_the_library_samples(command: Command, any_checkpoint: Path) -> None:
    told = command("generate", any_checkpoint, "--prompt", "def é", "--max-tokens", 30, "--seed", 5, "--json")
    ids = list(statewise.generate(statewise.load(any_checkpoint), list("def é".encode()), max_tokens=30, seed=5))
    assert told.json["tokens"] == ids
    assert told.json["text"] == bytes(ids).decode("utf-8", "replace")
    streamed = command("generate", any_checkpoint, "--prompt", "def é", "--max-tokens", 30, "--seed", 5)
    assert streamed.out == told.json["text"]
    assert streamed.err == ""


def test_a_and_then_b_tokens_are_a_plus_b(command: Command, any_checkpoint: Path, tmp_path: Path) -> None:
    ask = ("generate", any_checkpoint, *GREEDY, "--json", "--max-tokens")
    whole = command(*ask, 25, "--prompt", "import ").json["tokens"]
    head = command(*ask, 9, "--prompt", "import ", "--save-state", tmp_path / "s").json["tokens"]
    tail = command(*ask, 16, "--state", tmp_path / "s").json["tokens"]
    assert head + tail == whole


def test_a_prompt_goes_on_after_the_saved_text(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    ask = ("generate", checkpoint, *GREEDY, "--json", "--max-tokens")
    head = command(*ask, 5, "--prompt", "ab", "--save-state", tmp_path / "s").json["tokens"]
    tail = command(*ask, 7, "--state", tmp_path / "s", "--prompt", "cd").json["tokens"]
    model = statewise.load(checkpoint)
    assert tail == list(statewise.generate(model, [*b"ab", *head, *b"cd"], max_tokens=7, temperature=0))


def test_a_state_without_a_pending_token_needs_a_prompt(
    command: Command, refused: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    ask = ("generate", checkpoint, *GREEDY, "--json", "--max-tokens")
    assert command(*ask, 0, "--prompt", "ab", "--save-state", tmp_path / "s").code == 0
    assert "prompt" in refused(*ask, 3, "--state", tmp_path / "s")
    model = statewise.load(checkpoint)
    assert command(*ask, 3, "--state", tmp_path / "s", "--prompt", "c").json["tokens"] == list(
        statewise.generate(model, list(b"abc"), max_tokens=3, temperature=0)
    )


def test_prompts_come_from_files_and_standard_input(
    command: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ("generate", checkpoint, *GREEDY, "--max-tokens", 4, "--json")
    wanted = command(*ask, "--prompt", "añb").json["tokens"]
    (tmp_path / "p").write_text("añb", "utf-8")
    assert command(*ask, "--prompt-file", tmp_path / "p").json["tokens"] == wanted
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("añb".encode())))
    assert command(*ask, "--prompt", "-").json["tokens"] == wanted


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "prompt"),
        (("--prompt", ""), "no tokens"),
        (("--prompt", "a", "--prompt-file", "b"), "one of them"),
        (("--prompt-file", "absent"), "absent: No such file"),
        (("--prompt", "a\udcff"), "not UTF-8"),
        (("--prompt", "a", "--max-tokens", "-1"), "max_tokens"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
        (("--prompt", "a", "--top-p", "0"), "top_p"),
        (("--prompt", "a", "--top-k", "-1"), "top_k"),
        (("--prompt", "a", "--seed", "-1"), "seed"),
        (("--prompt", "a", "--state", "absent"), "absent: No such file"),
        (("--prompt", "a", "--save-state", "absent/s"), "absent is no directory"),
        (("--prompt", "a", "--max-tokens", "0", "--save-state", "/"), "--save-state: / cannot be written"),
        (("--prompt", "a", "--tokenizer", "absent"), "absent"),
        (("--prompt", "a", "--device", "toaster"), "toaster"),
        (("--prompt", "a", "--dtype", "int8"), "--dtype"),
    ],
)
def test_mistakes_are_one_line(
    refused: Callable[..., str], checkpoint: Path, arguments: tuple[str, ...], says: str
) -> None:
    assert says in refused("generate", checkpoint, *arguments)


def test_files_that_are_no_text_no_state_or_no_checkpoint_are_refused(
    refused: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "latin1").write_bytes("é".encode("latin-1"))
    assert "byte 0 is 0xe9" in refused("generate", checkpoint, "--prompt-file", tmp_path / "latin1")
    assert "state" in refused("generate", checkpoint, "--prompt", "a", "--state", tmp_path / "latin1")
    assert "no checkpoint" in refused("generate", tmp_path / "absent", "--prompt", "a")
    assert str(tmp_path) in refused("generate", tmp_path, "--prompt", "a")
    assert "latin1" in refused("generate", tmp_path / "latin1", "--prompt", "a")


def test_a_state_of_another_model_is_refused(
    command: Command, refused: Callable[..., str], checkpoint: Path, tmp_path: Path
) -> None:
    statewise.save(statewise.create("mamba", vocab_size=256, num_layers=1, width=32), tmp_path / "other")
    command("generate", tmp_path / "other", "--prompt", "a", "--max-tokens", 1, "--save-state", tmp_path / "s")
    assert "state is mamba" in refused("generate", checkpoint, "--prompt", "a", "--state", tmp_path / "s")


def test_rows_beyond_the_tokenizer_and_ids_without_a_piece_are_never_written(
    command: Command, refused: Callable[..., str], tmp_path: Path
) -> None:
    model = statewise.create("rwkv4", vocab_size=65536, num_layers=1, width=16)
    statewise.save(model, tmp_path / "wide")
    ask = ("generate", tmp_path / "wide", "--prompt", "aé", "--max-tokens", 40, "--seed", 1, "--json", "--tokenizer")
    hot = ("--temperature", 1000)
    told = command(*ask, "bytes", *hot)
    assert told.code == 0
    assert max(told.json["tokens"]) < 256

    pieces: list[str | bytes] = [chr(b) if b < 128 else bytes([b]) for b in range(256)]
    rows = [f"{3 * b + 5} {piece!r} {len(piece)}" for b, piece in enumerate(pieces)]  # two gaps after every piece
    (tmp_path / "gaps.txt").write_text("\n".join(rows), "utf-8")
    told = command(*ask, tmp_path / "gaps.txt", *hot)
    assert told.code == 0
    assert all(token % 3 == 2 and 5 <= token <= 770 for token in told.json["tokens"])

    statewise.save(statewise.create("rwkv4", vocab_size=255, num_layers=1, width=16), tmp_path / "narrow")
    said = refused("generate", tmp_path / "narrow", "--prompt", "a", "--tokenizer", "bytes")
    assert "tokenizer bytes has 256 ids, this model only 255" in said


def test_the_end_of_a_document_ends_the_text(command: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = statewise.create("rwkv4", vocab_size=257, num_layers=1, width=16)
    with torch.no_grad():  # every token is as likely as any other
        model.head.weight.zero_()
    statewise.save(model, tmp_path / "flat")
    pieces: list[str | bytes] = [chr(b) if b < 128 else bytes([b]) for b in range(256)]
    (tmp_path / "v.txt").write_text("\n".join(f"{b + 1} {pieces[b]!r} 1" for b in range(256)), "utf-8")
    ask = ("generate", tmp_path / "flat", "--prompt", "a", "--json", "--tokenizer", tmp_path / "v.txt")
    assert command(*ask, "--temperature", 0).json["tokens"] == [], "the first of equals is id 0"
    ids = command(*ask, "--max-tokens", 5000, "--seed", 1).json["tokens"]
    assert 0 < len(ids) < 5000
    assert 0 not in ids


def test_a_real_process_streams_bytes(checkpoint: Path) -> None:
    arguments = ["generate", str(checkpoint), "--prompt", "x", "--max-tokens", "20", "--seed", "1"]
    done = subprocess.run([sys.executable, "-m", "statewise", *arguments], capture_output=True, check=True)
    ids = list(statewise.generate(statewise.load(checkpoint), list(b"x"), max_tokens=20, seed=1))
    assert done.stdout.decode("utf-8") == bytes(ids).decode("utf-8", "replace")
    assert done.stderr == b""
