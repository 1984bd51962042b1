"""Ids to text and back: the published ids, every byte, every cut, and files that lie."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statewise.text import Tokenizer, load_tokenizer, trie
from statewise.text.tokenizers import ByteTokenizer
from statewise.text.trie import WORLD_FILE, TrieTokenizer

WORDS = ["a", "ab", "abcd", "é", "éa", "日本", " the", "\n\n", "'", '"', "\\", "'\""]


def lines(words: list[str] = WORDS) -> list[str]:
    pieces: list[str | bytes] = [chr(b) if b < 128 else bytes([b]) for b in range(256)]
    pieces += [word for word in words if len(word.encode()) > 1]
    sizes = [len(piece.encode() if isinstance(piece, str) else piece) for piece in pieces]
    return [f"{i} {piece!r} {size}" for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True), 1)]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> TrieTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "small.txt"
    path.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, TrieTokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def world(shared: Path) -> TrieTokenizer:
    tokenizer = load_tokenizer(shared / "data/tokenizers/rwkv_vocab_v20230424.txt")
    assert isinstance(tokenizer, TrieTokenizer)
    return tokenizer


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = tokenizer.decoder()
    return "".join([decoder.push(token) for token in ids]) + decoder.finish()


def test_byte_ids_are_utf8() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.name, tokenizer.vocab_size) == ("bytes", 256)
    assert tokenizer.encode("aé€") == [97, 0xC3, 0xA9, 0xE2, 0x82, 0xAC]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


@given(st.binary())
def test_bytes_streamed_is_decoded(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_bytes(data) == list(data)
    assert streamed(tokenizer, list(data)) == tokenizer.decode(list(data)) == data.decode(errors="replace")


def test_a_character_comes_whole_and_as_soon_as_it_can() -> None:
    decoder = ByteTokenizer().decoder()
    assert [decoder.push(token) for token in "a€b".encode()] == ["a", "", "", "€", "b"]
    assert [decoder.push(token) for token in (0xE2, 0x41)] == ["", "\ufffdA"]
    assert decoder.push(0xE2) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""
    assert decoder.push(0x41) == "A"


BAD_IDS: list[Any] = [-1, 256, 1.0, "a", None, True, 2**70, np.float32(3)]


@pytest.mark.parametrize("token", BAD_IDS, ids=repr)
def test_an_id_outside_the_vocabulary_is_refused(token: Any) -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="token id"):
        tokenizer.decode([65, token])
    decoder = tokenizer.decoder()
    decoder.push(0xC3)
    with pytest.raises(ValueError, match="token id"):
        decoder.push(token)
    assert decoder.push(0xA9) == "é", "a refused id must leave the decoder as it was"


def test_numpy_ids_are_ids() -> None:
    assert ByteTokenizer().decode(np.array([104, 105], dtype=np.uint8)) == "hi"  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [b"bytes", None, "broken \udcff"], ids=repr)
def test_what_is_not_text_is_refused(text: Any, small: TrieTokenizer) -> None:
    for tokenizer in (ByteTokenizer(), small):
        with pytest.raises(ValueError, match=r"^text: "):
            tokenizer.encode(text)


def test_unknown_name_and_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'gpt2' is neither 'bytes', 'rwkv-world' nor a file"):
        load_tokenizer("gpt2")
    with pytest.raises(ValueError, match="nor a file"):
        load_tokenizer(tmp_path)


# The trie.


def test_the_longest_piece_wins(small: TrieTokenizer) -> None:
    assert small.name == "small.txt"
    spelled = {word: small.encode(word)[0] for word in WORDS if len(word.encode()) > 1}
    assert small.encode("abc") == [spelled["ab"], ord("c") + 1]
    assert small.encode("abcabcd") == [spelled["ab"], ord("c") + 1, spelled["abcd"]]
    assert small.encode("ééa") == [spelled["é"], spelled["éa"]]
    assert small.encode("'\"\\") == [spelled["'\""], ord("\\") + 1]


def longest_match(pieces: dict[bytes, int], data: bytes) -> list[int]:
    """The definition: of all pieces that begin what is left, the longest."""
    ids = []
    while data:
        piece = max((piece for piece in pieces if data.startswith(piece)), key=len)
        ids.append(pieces[piece])
        data = data[len(piece) :]
    return ids


@given(st.lists(st.sampled_from([*WORDS, "c", "\xff", "本", "t", "h"])).map("".join) | st.text())
def test_encoding_is_the_definition(small: TrieTokenizer, text: str) -> None:
    pieces = {small._piece(token): token for token in range(1, small.vocab_size)}
    ids = small.encode(text)
    assert ids == longest_match(pieces, text.encode())
    assert small.decode(ids) == streamed(small, ids) == text


@given(st.lists(st.integers(0, 260)))
def test_any_ids_stream_as_they_decode(small: TrieTokenizer, ids: list[int]) -> None:
    assert streamed(small, ids) == small.decode(ids)


def test_id_zero_ends_a_document_and_is_silent(small: TrieTokenizer) -> None:
    assert small.decode([98, 0, 99]) == "ab"
    with pytest.raises(ValueError, match="token id"):
        small.decode([small.vocab_size])


def test_carriage_returns_at_line_ends_change_nothing(small: TrieTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "crlf.txt"
    path.write_bytes("\r\n".join(lines()).encode())
    tokenizer = load_tokenizer(path)
    assert [tokenizer.decode([i]) for i in range(260)] == [small.decode([i]) for i in range(260)]


BAD_LINES = {
    "code": ("1 __import__('os').getcwd() 1", "not a string or bytes literal"),
    "number": ("1 17 1", "not a string or bytes literal"),
    "deep": ("1 " + "(" * 5000 + " 1", "not a string or bytes literal"),
    "long": ("1 '" + "a" * 9000 + "' 9000", "longer than"),
    "length": ("1 'abc' 4", "the piece has 3 bytes, the line says 4"),
    "empty piece": ("1 '' 0", "the piece has 0 bytes"),
    "no length": ("1 'abc'", "expected ID LITERAL LENGTH"),
    "no id": ("'a' 1", "expected ID LITERAL LENGTH"),
    "empty line": ("", "expected ID LITERAL LENGTH"),
    "not utf-8": ("\udcff", "expected ID LITERAL LENGTH"),
    "huge id": ("99999999999 'a' 1", "is not in 1.."),
    "id zero": ("0 'zero' 4", "is not in 1.."),
    "repeated piece": ("1 'b' 1", "already given"),
    "lone surrogate": ("1 '\\udcff' 3", "surrogate"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_named(line: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    good = lines()
    path.write_bytes("\n".join([good[98], line, *good[1:]]).encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"vocabulary.txt, line 2: .*{reason}"):
        load_tokenizer(path)


def test_a_vocabulary_must_hold_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_text("\n".join(line for line in lines() if not line.startswith("66 ")), encoding="utf-8")
    with pytest.raises(ValueError, match="no piece for the single byte 0x41"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"\x80\x04."], ids=["empty", "zeros", "pickle"])
def test_a_file_that_is_no_vocabulary(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"vocabulary\.txt, line 1: expected ID LITERAL LENGTH"):
        load_tokenizer(path)


def test_world_matches_the_published_ids(world: TrieTokenizer, shared: Path) -> None:
    assert world.vocab_size == 65530
    golden = json.loads((shared / "data/tokenizers/golden_tokens.json").read_text())
    texts = json.loads((shared / "golden/rwkv/tokenizers.json").read_text())
    for case in golden["strings"] + texts:
        assert world.encode(case["text"]) == case["world"], case["text"]
        assert world.decode(case["world"]) == streamed(world, case["world"]) == case["text"]
    raw = [(case["hex"], case["world"]) for case in golden["bytes"]]
    raw += [
        (case["hex"], case["ids"]) for case in json.loads((shared / "golden/rwkv/tokenizer_bytes.json").read_text())
    ]
    for text, ids in raw:
        assert world.encode_bytes(bytes.fromhex(text)) == ids
        assert streamed(world, ids) == bytes.fromhex(text).decode(errors="replace")


def test_world_is_found_in_a_package(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pyrwkv_tokenizer"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('the package must not be imported')")
    content = (shared / "data/tokenizers/rwkv_vocab_v20230424.txt").read_bytes()
    (package / WORLD_FILE).write_bytes(content.replace(b"\n", b"\r\n"))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    tokenizer = load_tokenizer("rwkv-world")
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.encode("Hello world")) == (
        "rwkv-world",
        65530,
        [33155, 40213],
    )
    (package / WORLD_FILE).write_bytes(content[:-1000])
    with pytest.raises(ValueError, match="not the published vocabulary"):
        load_tokenizer("rwkv-world")


def test_world_without_a_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="neither is installed: `pip install rwkv`"):
        load_tokenizer("rwkv-world")


def test_world_is_compiled_where_it_can_be(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyrwkv_tokenizer", reason="the optional package pyrwkv-tokenizer is not installed")
    fast = load_tokenizer("rwkv-world")
    own = load_tokenizer(shared / "data/tokenizers/rwkv_vocab_v20230424.txt")
    assert isinstance(fast, TrieTokenizer)
    assert isinstance(own, TrieTokenizer)
    monkeypatch.setattr(trie, "BYTES_WORTH_LOADING", 0)
    assert fast._compiled is not None

    golden = json.loads((shared / "data/tokenizers/golden_tokens.json").read_text())
    for case in golden["strings"] + json.loads((shared / "golden/rwkv/tokenizers.json").read_text()):
        assert fast.encode(case["text"]) == case["world"], case["text"]
    for case in golden["bytes"]:  # the compiled package reads text alone
        assert fast.encode_bytes(bytes.fromhex(case["hex"])) == case["world"]

    # Characters from everywhere, and pieces of the vocabulary stuck together: where greedy matching goes wrong.
    pieces = [piece for token in range(1, 65530) if (piece := own.decode([token])) and "\ufffd" not in piece]
    many = st.text(max_size=60) | st.lists(st.sampled_from(pieces), max_size=20).map("".join)

    @settings(max_examples=1000)
    @given(many)
    def same_ids(text: str) -> None:
        ids = fast.encode(text)
        assert ids == own.encode_bytes(text.encode())
        assert fast.decode(ids) == text

    same_ids()
    with pytest.raises(ValueError, match="lone surrogate"):
        fast.encode("a\udcff")


def fake_package(folder: Path, content: bytes) -> None:
    """A stand-in for the compiled package, whose ids nobody could mistake."""
    package = folder / "pyrwkv_tokenizer"
    package.mkdir()
    (package / WORLD_FILE).write_bytes(content)
    (package / "__init__.py").write_text(
        "class WorldTokenizer:\n"
        "    def __init__(self, path): pass\n"
        "    def encode(self, text): return ['compiled']\n"
        "    def decode(self, ids): raise BaseException('panic')\n"
    )


@pytest.mark.parametrize(
    ("damage", "used"),
    [
        (lambda content: content, True),
        (lambda content: content.replace(b"\n", b"\r\n"), False),  # nobody has tried it on that
        (lambda content: content.replace(b"1 '\\x00' 1", b"1 '\\x01' 1"), False),
    ],
    ids=["published", "other line ends", "other piece"],
)
def test_the_compiled_package_is_used_on_its_own_vocabulary_alone(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes], used: bool
) -> None:
    content = (shared / "data/tokenizers/rwkv_vocab_v20230424.txt").read_bytes()
    fake_package(tmp_path, damage(content))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(trie, "BYTES_WORTH_LOADING", 12)
    monkeypatch.delitem(sys.modules, "pyrwkv_tokenizer", raising=False)
    renamed = tmp_path / "another name.txt"
    renamed.write_bytes(content)
    tokenizer = load_tokenizer(renamed)
    assert tokenizer.encode("Hello") == [33155], "a short text is not worth loading the package for"
    assert "pyrwkv_tokenizer" not in sys.modules
    assert tokenizer.encode("Hello world") == (["compiled"] if used else [33155, 40213])
    assert tokenizer.decode([33155, 40213]) == streamed(tokenizer, [33155, 40213]) == "Hello world"
    assert isinstance(tokenizer, TrieTokenizer)
    assert tokenizer.encode_bytes(b"Hello world") == [33155, 40213]
    monkeypatch.delitem(sys.modules, "pyrwkv_tokenizer", raising=False)


def test_another_vocabulary_never_asks_the_package(
    small: TrieTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trie, "BYTES_WORTH_LOADING", 0)
    monkeypatch.setattr(trie.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    assert small.decode(small.encode("Hello world")) == "Hello world"


def test_world_without_the_compiled_package(world: TrieTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trie, "BYTES_WORTH_LOADING", 0)
    monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
    monkeypatch.delitem(world.__dict__, "_compiled", raising=False)
    assert world.encode("Hello world") == [33155, 40213]
    monkeypatch.delitem(world.__dict__, "_compiled", raising=False)


def test_unused_ids_are_what_decode_refuses(small: TrieTokenizer, tmp_path: Path) -> None:
    assert small.unused_ids == ByteTokenizer().unused_ids == frozenset()
    path = tmp_path / "gaps.txt"
    path.write_text("\n".join([*lines([]), "300 'abc' 3", "303 'abd' 3"]), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab_size == 304
    assert tokenizer.unused_ids == {*range(257, 300), 301, 302}
    for token in range(304):
        if token in tokenizer.unused_ids:
            with pytest.raises(ValueError, match=rf"{token} has no piece"):
                tokenizer.decode([token])
        else:
            tokenizer.decode([token])
    assert tokenizer.end_id == 0
    assert tokenizer.decode([0]) == "", "the end of a document is silent, not unused"
    assert ByteTokenizer().end_id is None


# Hugging Face files.


def test_json_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'statewise\[text\]'"):
        load_tokenizer(tmp_path)


def test_json_that_is_no_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    path = tmp_path / "tokenizer.json"
    for content in (b"{}", b"{", b'{"model": 3}', b"{\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.json: not a tokenizer.json"):
            load_tokenizer(path)


def test_neox_matches_the_published_ids(shared: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = load_tokenizer(shared / "data/tokenizers/20B_tokenizer.json")
    assert tokenizer.vocab_size == 50277
    assert tokenizer.end_id == 0
    assert tokenizer.unused_ids == frozenset()
    for case in json.loads((shared / "data/tokenizers/golden_tokens.json").read_text())["strings"]:
        ids = case["neox20b"]
        assert tokenizer.encode(case["text"]) == ids
        assert tokenizer.decode(ids) == streamed(tokenizer, ids) == case["neox20b_decoded"]
    for case in json.loads((shared / "golden/rwkv/tokenizers.json").read_text()):
        assert tokenizer.encode(case["text"]) == case["pile20b"]
    with pytest.raises(ValueError, match="token id"):
        tokenizer.decode([50277])


def json_file(path: Path, vocab: dict[str, int], **more: Any) -> Path:
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    path.write_text(json.dumps({"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model, **more}))
    return path


def test_json_encodes_all_of_a_text_whatever_the_file_was_trained_with(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    fill = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[UNK]",
    }
    path = json_file(tmp_path / "tokenizer.json", {"[UNK]": 0, "a": 1, "b": 2}, truncation=cut, padding=fill)
    assert load_tokenizer(path).encode("a b a b") == [1, 2, 1, 2]


def test_json_with_gaps_tells_them(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    tokenizer = load_tokenizer(json_file(tmp_path / "tokenizer.json", {"[UNK]": 1, "a": 2, "b": 5}))
    assert (tokenizer.vocab_size, tokenizer.unused_ids, tokenizer.end_id) == (6, {0, 3, 4}, None)
    with pytest.raises(ValueError, match="3 has no piece"):
        tokenizer.decode([1, 3])


def test_json_with_an_impossible_id_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    path = json_file(tmp_path / "tokenizer.json", {"[UNK]": 0, "a": 4_000_000_000})
    with pytest.raises(ValueError, match=r"tokenizer\.json: id 4000000000 is not in"):
        load_tokenizer(path)


def test_json_of_another_kind_streams_what_it_decodes(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "ab", "▁ab"]
    model = library.models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[("▁", "a"), ("a", "b"), ("▁a", "b")],
        byte_fallback=True,
    )
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    decoders = library.decoders
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    text = "ab a 日本 ab é b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == text
    assert streamed(tokenizer, ids[: ids.index(0xE6) + 2]).startswith("ab a ")


def test_neither_torch_nor_numpy_is_imported(tmp_path: Path) -> None:
    code = "import sys, statewise.text as t; {}; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    run: Callable[[str], str] = lambda use: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code.format(use)], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout.strip()
    assert run("t.load_tokenizer('bytes').decode([65])") == "[]"
    assert run("t.load_corpus, t.order_entropy, t.decode_text") == "['numpy']"
