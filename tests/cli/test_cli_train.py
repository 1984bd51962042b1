"""``train``: flags, a file, both; runs that resume, and runs that are refused without harm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import statewise
from statewise.cli.train import configure
from statewise.training import TrainConfig

Command = Callable[..., Any]
Refused = Callable[..., str]

SMALL = ("--model", "rwkv4", "--num-layers", 1, "--width", 32, "--context", 16, "--batch-size", 2)
QUIET = ("--no-tensorboard", "--no-plot", "--eval-every", 0)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_text("".join(f"line {number * number}\n" for number in range(400)))
    return path


def test_a_run_from_flags_can_be_read_by_every_command(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    told = command("train", *SMALL, "--data", text, "--out", out, "--steps", 4, "--log-every", 2, "--json")
    assert told.code == 0, told.err
    assert told.json["step"] == 4
    assert Path(told.json["plot"]).read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [2, 4]
    assert "bits/byte" in told.err
    assert command("inspect", out, "--json").json["architecture"] == "rwkv4"
    assert command("evaluate", out, "--json").json["data"] == str(text)
    assert len(command("generate", out, "--prompt", "line", "--max-tokens", 5, "--json").json["tokens"]) == 5
    assert command("verify", out, "--length", 8).code == 0
    assert command("convert", out, tmp_path / "m.pth", "--to", "rwkv").code == 0
    assert statewise.load(tmp_path / "m.pth").config.width == 32


def test_resume_takes_the_runs_own_configuration(command: Command, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command("train", *SMALL, *QUIET, "--data", text, "--out", out, "--steps", 2)
    told = command("train", "--resume", "--out", out, "--steps", 5, "--json")
    assert told.code == 0, told.err
    assert told.json["step"] == 5
    assert TrainConfig.from_toml(out / "config.toml").width == 32


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('model = "mamba"\nwidth = 48\nsteps = 7\nbetas = [0.5, 0.6]\n')
    config = configure(tmp_path / "c.toml", {"steps": 9})
    assert (config.model, config.width, config.steps, config.betas) == ("mamba", 48, 9, (0.5, 0.6))


def test_a_run_from_a_file(command: Command, text: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        f'model = "rwkv4"\nnum_layers = 1\nwidth = 32\ncontext = 16\nbatch_size = 2\nsteps = 9\neval_every = 0\n'
        f"data = {json.dumps(str(text))}\nplot = false\n"
    )
    told = command("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "run", "--steps", 3)
    assert told.code == 0, told.err
    assert "step 3 of 3" in told.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--steps", "0"), "steps is 0"),
        (("--steps", "many"), "--steps"),
        (("--model", "rwkv3"), "rwkv3"),
        (("--data", "absent"), "absent"),
        (("--device", "toaster"), "toaster"),
        (("--dtype", "int8"), "--dtype"),
        (("--resume",), "nothing to resume"),
        (("--config", "absent.toml"), "absent.toml"),
        (("--batch-size", "0"), "batch_size"),
        (("--model-fields", "colour=3"), "colour"),
        (("--context", "100000"), "context"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    refused: Refused, text: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "run"
    assert says in refused("train", *SMALL, *QUIET, "--data", text, "--out", out, *arguments)
    assert not out.exists()


def test_unusable_data_and_files_are_one_line(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "hollow").mkdir()
    (tmp_path / "wrong.toml").write_text("widht = 3\n")
    (tmp_path / "latin1.toml").write_bytes(b"model = '\xe9'\n")
    ask = ("train", *SMALL, *QUIET, "--out", tmp_path / "run")
    assert "empty" in refused(*ask, "--data", tmp_path / "empty")
    assert "hollow" in refused(*ask, "--data", tmp_path / "hollow")
    assert "did you mean 'width'" in refused(*ask, "--config", tmp_path / "wrong.toml")
    assert "latin1.toml" in refused(*ask, "--config", tmp_path / "latin1.toml")
    assert not (tmp_path / "run").exists()


def test_a_used_folder_is_refused_and_kept(command: Command, refused: Refused, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ask = ("train", *SMALL, *QUIET, "--data", text, "--out", out, "--steps", 2)
    command(*ask)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert "already holds a run" in refused(*ask)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_an_interrupt_saves_and_tells_how_to_go_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [str(part) for part in (*SMALL, *QUIET, "--data", text, "--out", out, "--steps", 10**6)]
    process = subprocess.Popen(
        [sys.executable, "-m", "statewise", "train", *arguments, "--log-every", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"statewise train --resume" in told
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (out / "snapshots" / f"step-{steps[-1]:08d}").is_dir()
