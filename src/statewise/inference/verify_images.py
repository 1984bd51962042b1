"""Does a model of images keep its promises? The laws of :mod:`statewise.inference.verify` that need no state.

A bidirectional model has no steps and no pieces, so what is held equal is a row and the same row in a batch, a fast
kernel and the reference, an image as it is and the model's parts called one by one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statewise import models
from statewise.inference.verify import LawResult, bound_of, difference, run_laws
from statewise.models.vision.backbone import pair
from statewise.ops.dispatch import prefer

__all__ = ["verify_images"]


def verify_images(
    model: nn.Module,
    *,
    batch_size: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[LawResult]:
    """Run every law on ``model`` in its own dtype and on its own device, at its own image size and at a wider one.

    Args:
        model: a model of images of this package, in any mode; left as it is, gradients included, and run in evaluation
            mode. A fresh one should go through :func:`statewise.inference.stir` first.
        batch_size: images in a batch.
        seed: fixes the images.
        progress: called with each law's name before it runs.

    Returns:
        One row a law. Laws of exact equality (nothing mutated, save and load) have bound 0.

    Raises:
        ValueError: a batch below 2, or a model whose dtype has no bound.
    """
    if batch_size < 2:
        raise ValueError(f"batch_size is {batch_size}; at least 2 is accepted")
    bound = bound_of(model)
    training = model.training
    subject = _Subject(model.eval(), batch_size, seed)
    laws = [
        ("rows of a batch = alone", subject.rows, bound),
        ("head of features = whole", subject.parts, bound),
        ("features kept on the way = features", subject.intermediates, bound),
        ("fast kernels = reference", subject.reference, bound),
        ("gradients by fast kernels = reference", subject.gradients, bound),
        ("gradients with checkpointing = without", subject.checkpointing, bound),
        ("images and weights untouched", subject.untouched, 0.0),
        ("weights saved and loaded", subject.saved, 0.0),
    ]
    try:
        return run_laws(laws, progress)
    finally:
        model.train(training)


class _Subject:
    """A model with the images it is tried on: of its own size, and of another whose sides differ."""

    def __init__(self, model: nn.Module, batch_size: int, seed: int) -> None:
        self.model: Any = model
        config: Any = self.model.config
        like = next(model.parameters())
        generator = torch.Generator().manual_seed(seed)
        rows, columns = pair("image_size", config.image_size)
        wider = columns + config.patch[1] + 1  # by a patch and a bit of the next
        self.batches = [
            torch.randn(batch_size, config.in_channels, *sides, generator=generator).to(like)
            for sides in ((rows, columns), (rows, wider))
        ]

    @torch.no_grad()
    def rows(self) -> float:
        worst = 0.0
        for images in self.batches:
            alone = torch.cat([self.model(image) for image in torch.split(images, 1)])
            worst = max(worst, difference(self.model(images), alone))
        return worst

    @torch.no_grad()
    def parts(self) -> float:
        return max(
            difference(self.model.forward_head(self.model.forward_features(images)), self.model(images))
            for images in self.batches
        )

    @torch.no_grad()
    def intermediates(self) -> float:
        worst = 0.0
        for images in self.batches:
            features, kept = self.model.forward_intermediates(images, norm=True)
            (last,) = self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)
            worst = max(worst, difference(features, self.model.forward_features(images)), difference(last, kept[-1]))
        return worst

    @torch.no_grad()
    def reference(self) -> float:
        worst = 0.0
        for images in self.batches:
            fast = self.model(images)
            with prefer("reference"):
                worst = max(worst, difference(fast, self.model(images)))
        return worst

    def _gradients(self, images: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            live = images.clone().requires_grad_()
            logits = self.model(live)
            # Of every sign, and none that softmax or a sum to zero would hide.
            weights = torch.linspace(-1.0, 2.0, logits.numel(), dtype=logits.dtype, device=logits.device)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            total = (logits * weights.view(logits.shape)).sum()
            return list(torch.autograd.grad(total, [live, *trained], allow_unused=True, materialize_grads=True))

    def gradients(self) -> float:
        fast = self._gradients(self.batches[1])
        with prefer("reference"):
            return difference(fast, self._gradients(self.batches[1]))

    def checkpointing(self) -> float:
        plain = self._gradients(self.batches[0])
        before = self.model.grad_checkpointing
        self.model.set_grad_checkpointing(not before)
        try:
            return difference(self._gradients(self.batches[0]), plain)
        finally:
            self.model.set_grad_checkpointing(before)

    def untouched(self) -> float:
        images = [batch.clone() for batch in self.batches]
        weights = {name: value.clone() for name, value in self.model.state_dict().items()}
        for batch in self.batches:
            with torch.no_grad():
                self.model(batch)
            self._gradients(batch)
        gap = max(difference(now, before) for now, before in zip(self.batches, images, strict=True))
        return max(gap, difference(self.model.state_dict(), weights))

    @torch.no_grad()
    def saved(self) -> float:
        with tempfile.TemporaryDirectory() as folder:
            models.save(self.model, Path(folder) / "model", "statewise")
            again: Any = models.load(Path(folder) / "model", dtype=self.batches[0].dtype)
        images = self.batches[0]
        again = again.to(images).eval()
        same = {name: value.cpu() for name, value in again.state_dict().items()}
        mine = {name: value.cpu() for name, value in self.model.state_dict().items()}
        return max(difference(same, mine), difference(again(images), self.model(images)))
