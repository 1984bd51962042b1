"""The benchmarks of models of images and of loading, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import image_models, loading, vision


def test_images(tmp_path: Path) -> None:
    out = tmp_path / "vision.json"
    vision.main(["--sizes", "32x48", "--repeats", "1", "--threads", "1", "--precisions", "float32", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["who"] for row in rows] == 2 * ["vit_tiny", "vrwkv_tiny", "vim_tiny"]
    assert all(row["tokens"] == 6 and row["ms"] > 0 for row in rows)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_made_is_what_is_read(tmp_path: Path) -> None:
    for name, case in loading.CASES.items():
        small = case._replace(fields={"vocab_size": 40000, "num_layers": 2, "width": 64})
        path = tmp_path / (f"{name}.pth" if case.format == "rwkv" else name)
        loading.make(small, path)
        told = {}
        for who in ("statewise", "statewise, mapped"):
            row = loading._contest(who, path, path, case.dtype, 1, tmp_path / "logits")
            assert row["seconds"] > 0
            told[who] = torch.load(tmp_path / "logits")
        assert torch.isfinite(told["statewise"]).all()
        assert torch.equal(*told.values())


def test_classifiers_of_one_size(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits these are, is not installed")
    out = tmp_path / "digits.json"
    sizes = ["--width", "32", "--layers", "2", "--patch-size", "4", "--batch-size", "8", "--threads", "1"]
    image_models.main(["--data", "digits", "--minutes", "0.002", *sizes, "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert [result["model"] for result in results] == ["vrwkv", "vim", "vit"]
    assert all(result["steps"] > 0 and 0 <= result["top1"] <= result["top5"] <= 1 for result in results)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_they_are_of_one_size() -> None:
    sizes = [
        sum(p.numel() for p in image_models.build(name, 128, 6, 32, 4, 3, 10).parameters())
        for name in image_models.MODELS
    ]
    assert max(sizes) < 1.2 * min(sizes), sizes
