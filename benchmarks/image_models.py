"""Image classifiers of one size, trained for the same time on the same images: test accuracy over time.

    python -m benchmarks.image_models --data PATH.npz --minutes 10 --out benchmarks/results/DATE-images-NAME.json

Ours are `vrwkv` and `vim`, beside a plain ViT on torch's own attention. All read the same batches in the same order
(random shifts, mirrored images where the data allow it, label smoothing), with one untuned learning rate and a cosine
over the time given. They train in turns of some seconds, so that whatever else the machine does falls on all alike.
Measuring is not counted; reading images is, and is the same for all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.machine import describe
from benchmarks.plot import draw_accuracies
from benchmarks.vit import ViT
from statewise.files import atomic_write
from statewise.images import ImageSet, Preprocessing, load_images, measure_channels
from statewise.ops.memory import keep_freed_memory
from statewise.training.image_config import ImageTrainConfig
from statewise.training.image_data import ImageBatches
from statewise.training.image_metrics import measure_accuracy
from statewise.training.optimizer import build_optimizer, set_learning_rate

MODELS = ("vrwkv", "vim", "vit")
_WARMUP_STEPS = 50
_POINTS = 12  # measurements on the test images


def build(
    name: str, width: int, layers: int, image_size: int, patch_size: int, channels: int, classes: int
) -> nn.Module:
    """About 12 layers·width² parameters: a block of `vim` has fewer than those of the others, so it gets more."""
    import statewise

    sizes = {"image_size": image_size, "patch_size": patch_size, "in_channels": channels, "num_classes": classes}
    torch.manual_seed(0)
    if name == "vit":
        return ViT(width, layers, max(1, width // 64), **sizes)
    return statewise.create(name, width=width, num_layers=3 * layers // 2 if name == "vim" else layers, **sizes)


class Runner:
    """One model in training: trains when it is its turn, measures itself when due."""

    def __init__(
        self,
        name: str,
        data: ImageSet,
        config: ImageTrainConfig,
        preprocessing: Preprocessing,
        settings: dict[str, Any],
    ) -> None:
        assert config.image_size is not None
        assert config.patch_size is not None
        sizes = (settings["width"], settings["layers"], config.image_size, config.patch_size)
        self.name, self.data, self.config, self.preprocessing = name, data, config, preprocessing
        self.model = build(name, *sizes, data.channels, len(data.classes))
        self.optimizer = build_optimizer(self.model, config)
        self.batches = ImageBatches(data, config, preprocessing)
        self.rate, self.budget = settings["learning_rate"], settings["minutes"] * 60
        self.spent, self.step = 0.0, 0
        self.curve: list[dict[str, float]] = []

    @property
    def done(self) -> bool:
        return self.spent >= self.budget

    def turn(self, seconds: float) -> None:
        """Train for some seconds, or until the time is over."""
        until = min(self.spent + seconds, self.budget)
        self.model.train()
        while self.spent < until:
            began = time.perf_counter()
            cosine = 0.505 + 0.495 * math.cos(math.pi * self.spent / self.budget)
            set_learning_rate(self.optimizer, self.rate * min(1.0, (self.step + 1) / _WARMUP_STEPS) * cosine)
            images, targets = self.batches.read(self.step)
            loss = F.cross_entropy(self.model(images), targets)
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.model.parameters(), 5.0, error_if_nonfinite=True)
            self.optimizer.step()
            self.spent, self.step = self.spent + time.perf_counter() - began, self.step + 1
        if self.done or self.spent >= self.budget / _POINTS * (len(self.curve) + 1):
            self._measure()

    def _measure(self) -> None:
        found = measure_accuracy(self.model, self.data.test, self.preprocessing, batch_size=100)
        point = {"seconds": round(self.spent, 1), "step": self.step, "top1": found.top1, "top5": found.top5}
        self.curve.append(point)
        print(f"{self.name}: {self.spent:5.0f} s, step {self.step}, top-1 {100 * found.top1:.1f} %", flush=True)

    def result(self) -> dict[str, Any]:
        """The curve, the last accuracy, and how fast it went."""
        return {
            "model": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "images_per_second": round(self.step * self.config.batch_size / self.spent, 1),
            "epochs": round(self.batches.epoch(self.step), 2),
            "top1": self.curve[-1]["top1"],
            "top5": self.curve[-1]["top5"],
            "curve": self.curve,
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.image_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="digits, an .npz or a folder, as `statewise train` takes it")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=10.0, help="for each model")
    parser.add_argument("--turn", type=float, default=20.0, help="seconds a model trains before the next has its turn")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    data = load_images(options.data)
    asked = ImageTrainConfig(
        data=options.data,
        model="vrwkv",
        width=options.width,
        num_layers=options.layers,
        patch_size=options.patch_size,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
    )
    config = asked.resolved(data.side, mirrored=data.mirrored)
    assert config.image_size is not None
    mean, std = measure_channels(data.train, config.image_size)
    preprocessing = Preprocessing(config.image_size, data.channels, mean, std, data.classes)
    named = ("minutes", "turn", "width", "layers", "batch_size", "learning_rate")
    settings = {name: getattr(options, name) for name in named} | {"data": Path(options.data).stem}
    document: dict[str, Any] = {"kind": "image models", "machine": describe(), "settings": settings, "results": []}
    runners = [Runner(name, data, config, preprocessing, settings) for name in options.models.split(",")]
    while not all(runner.done for runner in runners):
        for runner in runners:
            if not runner.done:
                runner.turn(options.turn)
    document["results"] = [runner.result() for runner in runners]
    if options.out is not None:
        document["load_after"] = round(os.getloadavg()[0], 2)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(options.out, json.dumps(document, indent=1) + "\n")
        draw_accuracies(document, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
