"""How far reading has come: told in bytes, shown on a terminal, silent otherwise."""

from __future__ import annotations

import io
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import statewise
from statewise.cli import main
from statewise.errors import WeightsError
from statewise.weights import claims, progress


@pytest.fixture
def model() -> Any:
    return statewise.create("rwkv4", vocab_size=64, num_layers=2, width=32)


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.glob("model*")) if path.is_dir() else path.stat().st_size


@pytest.mark.parametrize("format", ["statewise", "rwkv"])
def test_bytes_rise_from_none_to_all(model: Any, tmp_path: Path, format: str) -> None:
    path = tmp_path / "model.pth"
    statewise.save(model, path, format=format)
    told: list[tuple[int, int]] = []
    statewise.load(path, progress=lambda done, total: told.append((done, total)))
    total = _size(path)
    assert [pair[1] for pair in told] == [total] * len(told)
    done = [pair[0] for pair in told]
    assert done[0] == 0
    assert done[-1] == total
    assert done == sorted(set(done))
    assert len(done) == len(model.state_dict()) + 2
    read = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    assert done[-2] == read, "what is told is what was read"


def test_one_large_tensor_is_told_in_pieces(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statewise.save(model, tmp_path / "model")
    monkeypatch.setattr(claims, "_PIECE", 1000)
    told: list[int] = []
    statewise.load(tmp_path / "model", progress=lambda done, _: told.append(done))
    assert max(b - a for a, b in itertools.pairwise(told[:-1])) <= 1000


def test_shards_count_towards_one_total(model: Any, tmp_path: Path) -> None:
    import json

    from safetensors.torch import save_file

    statewise.save(model, tmp_path / "model")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (tmp_path / "model/model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for file, part in {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}.items():
        save_file({name: tensors[name] for name in part}, tmp_path / "model" / file)
        where |= dict.fromkeys(part, file)
    total = _size(tmp_path / "model")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    told: list[tuple[int, int]] = []
    statewise.load(tmp_path / "model", progress=lambda *pair: told.append(pair))
    assert told[0] == (0, total)
    assert told[-1] == (total, total)


def test_gguf_is_told_too(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    statewise.save(statewise.create("rwkv7", vocab_size=64, num_layers=1, width=64), path, format="gguf")
    told: list[int] = []
    statewise.load(path, progress=lambda done, _: told.append(done))
    assert len(told) > 20
    assert (told[0], told[-1]) == (0, _size(path))


def test_a_record_read_twice_is_told_within_the_total(tmp_path: Path) -> None:
    model = statewise.create("mamba", vocab_size=2048, num_layers=1, width=16)  # mostly the embedding, which is tied
    statewise.save(model, tmp_path / "model", format="mamba-ssm")
    told: list[int] = []
    statewise.load(tmp_path / "model", progress=lambda done, _: told.append(done))
    assert told == sorted(told)
    assert told[-1] == _size(tmp_path / "model/pytorch_model.bin")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_is_shown_for_large_files_on_a_terminal_alone(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statewise.save(model, tmp_path / "[bold]small")  # a name that must not be taken for markup
    monkeypatch.setenv("TERM", "xterm")

    def shown(stream: io.StringIO, **asked: Any) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", stream)
            statewise.load(tmp_path / "[bold]small", **asked)
        return stream.getvalue()

    assert shown(Terminal()) == ""
    assert "load [bold]small" in shown(Terminal(), progress=True)
    assert shown(Terminal(), progress=False) == ""
    monkeypatch.setattr(progress, "LARGE", 1000)
    assert "load [bold]small" in shown(Terminal())
    assert shown(Terminal(), progress=False) == ""
    assert shown(io.StringIO()) == ""
    asked_for = shown(io.StringIO(), progress=True)
    assert "load [bold]small" in asked_for
    assert "\x1b" not in asked_for


def test_no_standard_error_is_no_terminal(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    statewise.save(model, tmp_path / "model")
    monkeypatch.setattr(progress, "LARGE", 0)
    monkeypatch.setattr(sys, "stderr", None)
    statewise.load(tmp_path / "model")


def test_a_pseudo_terminal_sees_the_bar_and_standard_output_does_not(model: Any, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
    import os

    statewise.save(model, tmp_path / "model")
    code = "import statewise.weights.progress as p; p.LARGE = 1; from statewise.cli import main; "
    code += "raise SystemExit(main(['inspect', 'model', '--json']))"
    master, slave = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
        check=True,
    )
    os.close(slave)
    seen = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "load model" in seen
    assert done.stdout.startswith(b"{")


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_show_nothing_off_a_terminal(
    model: Any, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LARGE", 0)
    statewise.save(model, tmp_path / "model")
    assert main([command, str(tmp_path / "model"), "--json"]) == 0
    assert capsys.readouterr().err == ""


def test_a_failure_ends_the_bar_and_the_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.pth").write_bytes(b"PK\x03\x04 not a zip")
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with pytest.raises(WeightsError, match=r"model\.pth"):
            statewise.load(tmp_path / "model.pth", progress=True)
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1, "the cursor is back"
    assert claims._COUNT.get() is None


def test_what_the_callable_raises_ends_the_load(model: Any, tmp_path: Path) -> None:
    statewise.save(model, tmp_path / "model")

    def stop(done: int, _: int) -> None:
        if done > 4000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statewise.load(tmp_path / "model", progress=stop)
    assert claims._COUNT.get() is None


def test_nothing_there_is_told_as_ever(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        statewise.load(tmp_path / "absent", progress=lambda *_: None)
    with pytest.raises(WeightsError, match=r"no config\.json"):
        statewise.load(tmp_path, progress=lambda *_: None)


@pytest.mark.parametrize("value", [1, "yes", 0.0], ids=repr)
def test_another_value_is_refused(model: Any, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError, match="progress"):
        statewise.load(tmp_path, progress=value)
