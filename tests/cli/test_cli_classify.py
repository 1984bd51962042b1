"""Classifiers of images from the command line: train, classify, evaluate."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import statewise

Command = Callable[..., Any]
Refused = Callable[..., str]

SMALL = ("--num-layers", 2, "--width", 24, "--batch-size", 8, "--no-tensorboard", "--log-every", 2)


@pytest.fixture
def stripes(tmp_path: Path) -> Path:
    """A folder: stripes that lie and stripes that stand."""
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        pixels[slice(0, 8, 2) if number % 2 else slice(None), slice(None) if number % 2 else slice(0, 8, 2)] += 150
        path = tmp_path / "data" / ("lie" if number % 2 else "stand") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "data"


def test_a_run_is_trained_resumed_measured_and_asked(command: Command, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fast = ("--learning-rate", 4e-3, "--warmup-steps", 2, "--ema", 0.8, "--no-flip", "--crop", "none")
    told = command(
        "train", "--no-plot", "--model", "vrwkv_tiny", *SMALL, *fast, "--data", stripes, "--out", out, "--steps", 40
    )
    assert told.code == 0, told.err
    assert "images/s" in told.err
    told = command("train", "--resume", "--plot", "--out", out, "--steps", 60, "--json")
    assert told.code == 0, told.err
    assert told.json["step"] == 60
    assert [Path(plot).name for plot in told.json["plots"]] == ["curves.png", "confusion.png"]
    measured = command("evaluate", out, "--json").json
    assert measured["top1"] == told.json["test_top1"] > 0.9
    assert measured["images"] == 8
    assert sum(map(sum, measured["confusion"])) == 8
    assert "top-1" in command("evaluate", out, "--split", "train").out
    picture = tmp_path / "explained.png"
    asked = command(
        "classify", out, stripes / "lie" / "1.png", stripes / "stand" / "2.png", "--explain", picture, "--json"
    )
    assert asked.code == 0, asked.err
    assert [entry["classes"][0]["class"] for entry in asked.json["images"]] == ["lie", "stand"]
    assert sum(found["probability"] for found in asked.json["images"][0]["classes"]) == pytest.approx(1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "lie" in command("classify", out, stripes / "lie" / "1.png", "--top", 1).out
    assert command("inspect", out, "--json").json["architecture"] == "vrwkv"


def test_a_file_names_a_model_of_images(command: Command, stripes: Path, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        f'model = "vim_tiny"\ndata = {json.dumps(str(stripes))}\nsteps = 9\nnum_layers = 1\nwidth = 16\nplot = false\n'
    )
    told = command("train", "--config", tmp_path / "c.toml", "--out", tmp_path / "run", "--steps", 1, "--batch-size=4")
    assert told.code == 0, told.err
    assert "step 1 of 1" in told.out
    picture = next(stripes.rglob("*.png"))
    asked = command("classify", tmp_path / "run", picture, "--explain", tmp_path / "e.png")
    assert asked.code == 0, asked.err


def test_a_checkpoint_of_no_run_reads_as_models_for_imagenet(command: Command, stripes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = statewise.create("vrwkv_tiny", num_layers=1, width=16, num_classes=7, image_size=32, patch_size=16)
    statewise.save(model, tmp_path / "m")
    told = command("classify", tmp_path / "m", stripes / "lie" / "1.png", "--json")
    assert len(told.json["images"][0]["classes"]) == 5
    assert told.json["images"][0]["classes"][0]["class"].isdigit()


def test_what_is_refused(refused: Refused, checkpoint: Path, stripes: Path, tmp_path: Path) -> None:
    picture = stripes / "lie" / "1.png"
    assert "a model of text" in refused("classify", checkpoint, picture)
    assert "IMAGES" in refused("classify", checkpoint)
    statewise.save(statewise.create("vrwkv", num_layers=1, width=16, num_classes=0, image_size=16), tmp_path / "bare")
    assert "without a classifier" in refused("classify", tmp_path / "bare", picture)
    statewise.save(statewise.create("vrwkv", num_layers=1, width=16, num_classes=2, image_size=16), tmp_path / "m")
    (tmp_path / "note.png").write_text("hello")
    assert "note.png: not an image" in refused("classify", tmp_path / "m", tmp_path / "note.png")
    assert "no.png" in refused("classify", tmp_path / "m", tmp_path / "no.png")
    assert "--data is needed" in refused("evaluate", tmp_path / "m")
    assert "unrecognized" in refused("train", "--model", "vrwkv_tiny", "--context", 8)
    assert "no images at" in refused("train", "--model=vim_tiny", "--data", tmp_path / "no", "--out", tmp_path / "r")
    assert "nothing to resume" in refused("train", "--model", "vim_tiny", "--resume", "--out", tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from statewise.cli import main; "
        "codes = [main(['train', '--model', 'vrwkv_tiny', '--help']), main(['classify', '--help'])]; "
        "sys.exit(any(codes) or 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "--label-smoothing" in told.stdout
    assert "--explain" in told.stdout
