from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import statewise
from statewise.errors import SnapshotError
from statewise.images import load_images, read_preprocessing
from statewise.training import ImageTrainConfig, latest_snapshot, train_classifier
from statewise.training.classify import describe_images, follow, share_kept
from statewise.training.image_data import cutmix, mixup, soft_targets
from statewise.training.image_metrics import draw_confusion, measure_accuracy
from statewise.training.metrics import VOLATILE, read_metrics

PNG = b"\x89PNG"


@pytest.fixture
def stripes(tmp_path: Path) -> str:
    """Stripes lying, standing, or neither, under noise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, (90, 8, 8, 1), dtype=np.uint8)
    labels = np.arange(90) % 3
    images[labels == 0, ::2] += 150
    images[labels == 1, :, ::2] += 150
    np.savez(
        tmp_path / "stripes.npz", train_images=images, train_labels=labels, classes=np.array(["lie", "stand", "no"])
    )
    return str(tmp_path / "stripes.npz")


def config(data: str, out: Path, **others: Any) -> ImageTrainConfig:
    base = {"num_layers": 2, "width": 24, "batch_size": 8, "steps": 6, "warmup_steps": 2, "log_every": 2}
    quiet = {"save_every": 3, "eval_every": 4, "tensorboard": False, "plot": False, "seed": 3}
    return ImageTrainConfig(**{"model": "vrwkv_tiny", **base, **quiet, "data": data, "out": str(out), **others})


def lasting(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in VOLATILE} for r in read_metrics(out / "metrics.jsonl")]


def files(out: Path) -> dict[str, bytes]:
    snapshot = latest_snapshot(out)
    assert snapshot is not None
    return {path.name: path.read_bytes() for path in snapshot.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("model", "others"),
    [
        ("vrwkv_tiny", {"mixup": 0.8, "cutmix": 1.0, "model_fields": {"drop_path_rate": 0.5}}),
        ("vim_tiny", {"ema": 0.0, "crop": "resized", "model_fields": {"drop_rate": 0.2, "state_size": 4}}),
    ],
)
def test_a_broken_run_ends_as_the_whole_one(stripes: str, tmp_path: Path, model: str, others: dict[str, Any]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train_classifier(config(stripes, whole, model=model, **others), progress=lambda report: None)
    assert torch.equal(torch.get_rng_state(), before)

    def stop(report: Mapping[str, Any]) -> None:
        if report["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_classifier(config(stripes, broken, model=model, **others), progress=stop)
    torch.manual_seed(2)  # nothing may hang on it
    train_classifier(config(stripes, broken, model=model, resume=True, **others), progress=lambda report: None)
    assert files(whole) == files(broken)
    assert lasting(whole) == lasting(broken)
    assert [record["step"] for record in lasting(whole)] == [2, 4, 6]


def test_stripes_are_learnt_and_all_is_written(stripes: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    reports: list[Mapping[str, Any]] = []
    told = train_classifier(
        config(stripes, out, steps=60, eval_every=20, learning_rate=4e-3, plot=True, flip=False, ema=0.9),
        progress=reports.append,
    )
    assert reports[0]["loss"] > 1.0 > told.loss
    assert told.test_top5 == 1.0 >= told.test_top1 > 0.9
    assert told.images == 480
    assert "top-1" in describe_images(reports[-1])
    assert "top-1" not in describe_images(reports[0])
    for name in ("curves.png", "confusion.png"):
        assert (out / name).read_bytes().startswith(PNG)
    record = read_metrics(out / "metrics.jsonl")[-1]
    assert {"step", "loss", "test_loss", "test_top1", "test_top5", "learning_rate", "grad_norm", "images"} <= set(
        record
    )
    # What was measured is what a checkpoint of the run holds.
    model: Any = statewise.load(told.snapshot)
    rule = read_preprocessing(told.snapshot)
    assert rule is not None
    assert rule.classes == ("lie", "stand", "no")
    assert measure_accuracy(model, load_images(stripes).test, rule, batch_size=8).top1 == told.test_top1
    assert measure_accuracy(model, load_images(stripes).test, rule, batch_size=5).loss == pytest.approx(
        told.test_loss, rel=1e-5
    )


def test_what_may_not_change_on_resume(stripes: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_classifier(config(stripes, out, steps=2), progress=lambda report: None)
    with pytest.raises(ValueError, match=r"mixup is 0\.5, but the run in"):
        train_classifier(config(stripes, out, steps=3, mixup=0.5, resume=True))
    with pytest.raises(ValueError, match="already holds a run"):
        train_classifier(config(stripes, out))
    with np.load(stripes) as archive:
        arrays = dict(archive)
    arrays["train_images"] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match="does not hold the images"):
        train_classifier(config(str(tmp_path / "other.npz"), out, steps=3, resume=True))
    snapshot = latest_snapshot(out)
    assert snapshot is not None
    path = snapshot / "training.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SnapshotError, match=r"training\.safetensors"):
        train_classifier(config(stripes, out, steps=3, resume=True))


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"model": "rwkv7"}, "a model of images"),
        ({"steps": 0}, "steps is 0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"crop": "half"}, "'none' or 'shift' or 'resized'"),
        ({"model_fields": {"width": 3}}, "has a name of its own"),
        ({"model_fields": {"num_classes": 3}}, "which the data tell"),
        ({"mixup": -1}, "mixup is -1"),
        ({"flip": 1}, "flip is 1"),
    ],
)
def test_configurations_that_are_refused(others: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ImageTrainConfig(**others)


def test_a_configuration_is_read_back_from_its_file(tmp_path: Path) -> None:
    given = ImageTrainConfig(flip=False, betas=(0.8, 0.9), model_fields={"drop_path_rate": 0.1}, image_size=12)
    (tmp_path / "c.toml").write_text(given.to_toml())
    assert ImageTrainConfig.from_toml(tmp_path / "c.toml") == given
    with pytest.raises(ValueError, match="did you mean 'image_size'"):
        ImageTrainConfig.from_dict({"image_sise": 8})


def test_what_is_left_open_follows_the_data() -> None:
    for side, mirrored, size, patch, crop in (
        (8, False, 8, 2, "shift"),
        (28, True, 28, 4, "shift"),
        (32, True, 32, 4, "shift"),
        (None, True, 224, 16, "resized"),
        (1, True, 1, 1, "shift"),
    ):
        found = ImageTrainConfig(data="d.npz").resolved(side, mirrored=mirrored)
        assert (found.image_size, found.patch_size, found.crop, found.flip) == (size, patch, crop, mirrored)
        assert found.width is None
    digits = ImageTrainConfig().resolved(8, mirrored=False)
    assert (digits.image_size, digits.patch_size, digits.width, digits.mixup, digits.flip) == (16, 4, 96, 0.4, False)
    assert ImageTrainConfig(flip=True, patch_size=1).resolved(8, mirrored=False).flip


def test_mixtures_by_hand() -> None:
    targets = soft_targets(torch.tensor([0, 1]), 2, 0.2)
    assert torch.allclose(targets, torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    images = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    mixed, soft = mixup(images, targets, 0.75)
    assert torch.allclose(mixed[:, 0, 0, 0], torch.tensor([0.25, 0.75]))
    assert torch.allclose(soft[0], torch.tensor([0.7, 0.3]))
    mixed, soft = cutmix(images, targets, (1, 0, 3, 2))
    assert mixed[0, 0].tolist() == [[0] * 4, [1, 1, 0, 0], [1, 1, 0, 0], [0] * 4]
    assert torch.allclose(mixed[1], 1 - mixed[0])
    assert torch.allclose(soft[0], torch.tensor([0.7, 0.3]))
    assert images[0].eq(0).all()


def test_the_moving_average_by_hand() -> None:
    average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(average.weight, 4.0)
    torch.nn.init.constant_(model.weight, 8.0)
    follow(average, model, 0.75)
    assert average.weight.item() == 5.0
    assert share_kept(0.999, 1) == 2 / 11
    assert share_kept(0.5, 1000) == 0.5


class _Told(torch.nn.Module):
    """Logits by the image's first pixel: classes nearest to it first."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -(images[:, 0, 0, 0, None] * 255 - torch.arange(7)).abs()


def test_accuracy_by_hand(tmp_path: Path) -> None:
    # Predicted: 0, 3, 3, 6; the fourth label is behind the five nearest.
    pixels = np.array([0, 3, 3, 6], np.uint8).reshape(4, 1, 1, 1)
    np.savez(
        tmp_path / "d.npz", train_images=pixels, train_labels=[0, 3, 4, 6], test_images=pixels, test_labels=[0, 3, 4, 0]
    )
    from statewise.images import Preprocessing

    rule = Preprocessing(1, 1, (0.0,), (1.0,))
    found = measure_accuracy(_Told(), load_images(str(tmp_path / "d.npz")).test, rule, batch_size=3)
    assert (found.top1, found.top5) == (0.5, 0.75)
    assert found.confusion.sum() == 4
    assert (found.confusion[0, 0], found.confusion[3, 3], found.confusion[4, 3], found.confusion[0, 6]) == (1, 1, 1, 1)
    draw_confusion(found.confusion, (), tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").read_bytes().startswith(PNG)


def test_metrics_are_lines_of_json(stripes: str, tmp_path: Path) -> None:
    train_classifier(config(stripes, tmp_path / "run", steps=2, dtype="bfloat16"), progress=lambda report: None)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2]
