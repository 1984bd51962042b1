"""``inspect``, ``convert``, ``verify``, ``evaluate``, ``bench``, ``backends`` on checkpoints, good and bad."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import statewise
from statewise.inference import evaluate_bits_per_byte
from statewise.text import compressor_bits_per_byte, load_corpus, order_entropy

Command = Callable[..., Any]
Refused = Callable[..., str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 4,000 bytes of text: 200 of them in the test split."""
    path = tmp_path / "text"
    path.write_text("".join(f"line {number * number}\n" for number in range(400))[:4000])
    return path


def test_inspect_tells_what_is_there(command: Command, any_checkpoint: Path) -> None:
    model = statewise.load(any_checkpoint)
    report = command("inspect", any_checkpoint, "--json").json
    assert report["architecture"] == any_checkpoint.name
    assert report["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert report["config"]["width"] == 64
    assert report["dtypes"] == {"float32": len(model.state_dict())}
    assert {entry["name"]: entry["shape"] for entry in report["tensors"]} == {
        name: list(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert (report["missing"], report["extra"], report["misshaped"]) == ([], [], [])
    table = command("inspect", any_checkpoint).out
    assert all(name in table for name in model.state_dict())


def test_inspect_names_what_is_missing_extra_or_misshaped(command: Command, checkpoint: Path, tmp_path: Path) -> None:
    command("convert", checkpoint, tmp_path / "m.pth", "--to", "rwkv")
    tensors = torch.load(tmp_path / "m.pth", weights_only=True)
    del tensors["blocks.1.att.time_first"]
    tensors["blocks.0.att.surplus"] = torch.zeros(3)
    tensors["blocks.0.ffn.key.weight"] = tensors["blocks.0.ffn.key.weight"][:, 1:].clone()
    torch.save(tensors, tmp_path / "broken.pth")
    report = command("inspect", tmp_path / "broken.pth", "--json").json
    assert report["missing"] == ["blocks.1.att.time_first"]
    assert report["extra"] == ["blocks.0.att.surplus"]
    assert report["misshaped"] == ["blocks.0.ffn.key.weight"]
    assert "blocks.1.att.time_first" in command("inspect", tmp_path / "broken.pth").out


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, "rwkv") for name in ("rwkv4", "rwkv5", "rwkv6", "rwkv7")),
        ("rwkv7", "fla"),
        ("rwkv4", "hf"),
        *((name, format) for name in ("mamba", "mamba2") for format in ("mamba-ssm", "hf")),
        ("mamba3", "mamba-ssm"),
    ],
)
def test_convert_loses_nothing_there_and_back(command: Command, tmp_path: Path, name: str, format: str) -> None:
    model = statewise.create(name, vocab_size=256, num_layers=2, width=64).to(torch.bfloat16)
    statewise.save(model, tmp_path / "first")
    away, back = tmp_path / "away.pth", tmp_path / "back"
    assert command("convert", tmp_path / "first", away, "--to", format, "--json").json["to"] == format
    assert command("convert", away, back).code == 0
    again = statewise.load(back, dtype=torch.bfloat16)
    assert (again.config.num_layers, again.config.width) == (2, 64)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_convert_writes_over_nothing_unasked(
    command: Command, refused: Refused, checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "m.pth"
    target.write_text("precious")
    assert "already there" in refused("convert", checkpoint, target, "--to", "rwkv")
    assert target.read_text() == "precious"
    assert command("convert", checkpoint, target, "--to", "rwkv", "--overwrite").code == 0
    assert "onto itself" in refused("convert", target, target, "--to", "rwkv", "--overwrite")
    assert statewise.load(target).state_dict().keys() == statewise.load(checkpoint).state_dict().keys()
    assert "--to" in refused("convert", checkpoint, tmp_path / "x", "--to", "onnx")
    assert "cannot hold" in refused("convert", checkpoint, tmp_path / "x", "--to", "mamba-ssm")
    assert "no directory" in refused("convert", checkpoint, tmp_path / "no" / "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pth"]


@pytest.mark.parametrize("name", ["inspect", "convert", "verify", "evaluate", "generate"])
def test_what_is_no_checkpoint_is_refused(refused: Refused, tmp_path: Path, name: str) -> None:
    more = {"convert": [tmp_path / "out"], "evaluate": ["--data", "stdlib"], "generate": ["--prompt", "a"]}
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    for place in ("absent", "folder", "empty.pth", "noise.safetensors"):
        assert place in refused(name, tmp_path / place, *more.get(name, []))
    assert not (tmp_path / "out").exists()


def test_verify_passes_sound_models(command: Command, any_checkpoint: Path) -> None:
    told = command("verify", any_checkpoint, "--length", 20, "--json")
    assert told.code == 0
    assert told.json["ok"] is True
    assert len(told.json["laws"]) == 11
    assert all(law["ok"] for law in told.json["laws"])


def test_verify_exits_with_1_on_a_failure(command: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(statewise.load(checkpoint))
    sound = kind.step

    def off(self: torch.nn.Module, token: torch.Tensor, state: Any) -> Any:
        logits, state = sound(self, token, state)
        return logits + 1e-3, state

    monkeypatch.setattr(kind, "step", off)
    told = command("verify", checkpoint, "--length", 10)
    assert told.code == 1
    (line,) = [line for line in told.out.splitlines() if "FAILS" in line]
    assert line.startswith("token by token = whole")


def test_verify_tells_the_names_it_knows(refused: Refused) -> None:
    assert f"names are {', '.join(statewise.list_models())}" in refused("verify", "rwkv99")


def test_verify_takes_a_name_and_a_dtype(command: Command) -> None:
    told = command("verify", "rwkv4", "--length", 10, "--dtype", "float32")
    assert told.code == 0
    assert told.out.splitlines()[0] == "rwkv4, float32 on cpu"


@pytest.mark.parametrize("name", ["vrwkv_tiny", "vim_tiny"])
def test_verify_knows_models_of_images(command: Command, name: str) -> None:
    told = command("verify", name, "--json")
    assert told.code == 0
    assert len(told.json["laws"]) == 8
    assert all(law["ok"] for law in told.json["laws"])


def test_evaluate_tells_bits_beside_the_yardsticks(command: Command, any_checkpoint: Path, text: Path) -> None:
    held_out = load_corpus(text).test
    told = command("evaluate", any_checkpoint, "--data", text, "--window", 64, "--json").json
    alone = evaluate_bits_per_byte(statewise.load(any_checkpoint), held_out)
    assert told["bits_per_byte"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert told["perplexity"] == pytest.approx(2 ** told["bits_per_byte"])
    assert told["bytes"] == len(held_out)
    packed = compressor_bits_per_byte(held_out)
    assert told["gzip_bits_per_byte"] == packed["gzip"]
    assert told["xz_bits_per_byte"] == packed["xz"]
    assert told["order1_bits_per_byte"] == order_entropy(held_out, 1)
    other = command("evaluate", any_checkpoint, "--data", text, "--window", 7, "--json").json
    assert other["bits_per_byte"] == pytest.approx(told["bits_per_byte"], rel=1e-5)
    assert math.isclose(
        command("evaluate", any_checkpoint, "--data", text, "--split", "valid", "--json").json["bytes"],
        len(load_corpus(text).valid),
    )


def test_evaluate_prints_a_table(command: Command, checkpoint: Path, text: Path) -> None:
    lines = command("evaluate", checkpoint, "--data", text).out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "model",
        "gzip -9",
        "xz -9e",
        "order-0 entropy",
        "order-1 entropy",
    ]


def test_evaluate_refuses_what_it_cannot_read(refused: Refused, checkpoint: Path, tmp_path: Path, text: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "short").write_text("ab")
    assert "--data" in refused("evaluate", checkpoint)
    assert "absent" in refused("evaluate", checkpoint, "--data", tmp_path / "absent")
    assert "empty" in refused("evaluate", checkpoint, "--data", tmp_path / "empty")
    assert "hollow" in refused("evaluate", checkpoint, "--data", tmp_path / "hollow")
    assert "valid split" in refused("evaluate", checkpoint, "--data", tmp_path / "short", "--split", "valid")
    assert "window" in refused("evaluate", checkpoint, "--data", text, "--window", 0)
    assert "--split" in refused("evaluate", checkpoint, "--data", text, "--split", "all")


def test_a_model_that_says_nan_is_an_error_not_a_number(
    refused: Refused, checkpoint: Path, tmp_path: Path, text: Path
) -> None:
    model = statewise.load(checkpoint)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    statewise.save(model, tmp_path / "nan")
    assert "not finite" in refused("evaluate", tmp_path / "nan", "--data", text)
    assert "NaN" in refused("generate", tmp_path / "nan", "--prompt", "a")


@pytest.fixture(name="no_peers")
def _no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which peers are installed is no matter of these tests."""
    from statewise.testing import peers

    monkeypatch.setitem(peers.PEERS, "wkv4", {})


@pytest.mark.usefixtures("no_peers")
def test_bench_times_every_length(command: Command) -> None:
    told = command(
        "bench", "wkv4", "--lengths", "8,16", "--width", 8, "--repeats", 1, "--backends", "torch,reference", "--json"
    )
    rows = told.json["rows"]
    assert [(row["length"], row["who"]) for row in rows] == [
        (8, "statewise torch"),
        (8, "statewise reference"),
        (16, "statewise torch"),
        (16, "statewise reference"),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    assert np.isclose(rows[1]["ratio"], rows[1]["seconds"] / rows[0]["seconds"])


def test_bench_times_a_peer_that_agrees_and_names_one_that_does_not(
    command: Command, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statewise.testing import peers

    def right() -> peers.Run:
        return lambda inputs: statewise.ops.wkv4(**inputs, backend="reference")[0]

    def wrong() -> peers.Run:
        return lambda inputs: inputs["v"]

    table = {"right": ("torch", right), "wrong": ("torch", wrong), "gone": ("no-such-package", right)}
    monkeypatch.setitem(peers.PEERS, "wkv4", table)
    sizes = ("bench", "wkv4", "--lengths", "8", "--width", 8, "--repeats", 1, "--backends", "torch")
    told = command(*sizes, "--json").json
    ours, agrees, differs = told["rows"]
    assert ours["who"] == "statewise torch"
    assert agrees["who"].startswith("right")
    assert agrees["seconds"] > 0
    assert "differs" in differs["skipped"]
    assert "no-such-package" in told["absent"]["gone"]
    assert [row["who"].split()[0] for row in command(*sizes, "--against", "right", "--json").json["rows"]] == [
        "statewise",
        "right",
    ]
    assert "no-such-package" in refused(*sizes, "--against", "gone")
    assert "not timed: gone" in command(*sizes).out


@pytest.mark.usefixtures("no_peers")
def test_bench_leaves_out_what_would_take_too_long(command: Command) -> None:
    sizes = ("--lengths", "8,800", "--width", 8, "--repeats", 1, "--backends", "torch")
    told = command("bench", "wkv4", *sizes, "--cap", 1e-9, "--json").json
    assert "skipped" not in told["rows"][0]
    assert "would take" in told["rows"][1]["skipped"]


OPERATORS = [f"{name}-op" if name in ("mamba3",) else name for name in statewise.ops.backends()]


@pytest.mark.parametrize("name", [*OPERATORS, "rwkv4", "mamba"])
def test_bench_knows_operators_and_models(command: Command, name: str) -> None:
    for way in ("--backward", "--no-backward"):
        told = command("bench", name, "--lengths", 4, "--width", 64, "--repeats", 1, "--num-layers", 1, way)
        assert told.code == 0, told.err
        assert told.out.splitlines()[2].split()[0] == "4"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("wkv9",), "wkv9"),
        (("wkv4", "--lengths", "0"), "--lengths"),
        (("wkv4", "--lengths", ""), "--lengths"),
        (("wkv4", "--width", "0"), "--width"),
        (("wkv7", "--width", "65"), "--width"),
        (("wkv4", "--backends", "cobol"), "cobol"),
        (("wkv4", "--against", "nobody"), "nobody"),
        (("wkv4", "--repeats", "0"), "--repeats"),
    ],
)
def test_bench_mistakes_are_one_line(refused: Refused, arguments: tuple[str, ...], says: str) -> None:
    assert says in refused("bench", *arguments)


def test_backends_tells_every_operator(command: Command) -> None:
    told = command("backends", "--json").json
    assert told == {
        op: {name: {"serves": status.serves, "reason": status.reason} for name, status in row.items()}
        for op, row in statewise.backends().items()
    }
    table = command("backends").out
    assert all(op in table for op in told)
