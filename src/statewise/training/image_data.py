"""Batches of images. What is read at a step is a function of the data, the seed and the step's number alone.

Legend: B images a batch, C channels, S pixels of a side.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from statewise.images import ImageSet, Preprocessing, augment
from statewise.training.image_config import ImageTrainConfig

__all__ = ["ImageBatches", "cutmix", "mixup", "soft_targets", "step_seed"]

# What a generator of random numbers is for; each has a stream of its own.
_ORDER, _VIEW, _MIXTURE, _MODEL = 0, 1, 2, 3


def step_seed(seed: int, step: int) -> int:
    """For torch's generator, which draws what a model drops in training."""
    return int(np.random.SeedSequence([seed, _MODEL, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Labels ``(B,)`` → ``(B, num_classes)``: smoothing/num_classes everywhere, and 1 - smoothing more at the label."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup(images: Tensor, targets: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """``share`` of each image and its target, and the rest of the one at its place counted from the batch's end
    (Zhang et al. 2018)."""
    return share * images + (1 - share) * images.flip(0), share * targets + (1 - share) * targets.flip(0)


def cutmix(images: Tensor, targets: Tensor, box: tuple[int, int, int, int]) -> tuple[Tensor, Tensor]:
    """The box (top, left, bottom, right) of each image from the one at its place counted from the batch's end; targets
    in proportion to the areas (Yun et al. 2019)."""
    top, left, bottom, right = box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return mixed, share * targets + (1 - share) * targets.flip(0)


class ImageBatches:
    """Training batches without end: every image once an epoch, in an order that every epoch draws anew."""

    def __init__(self, data: ImageSet, config: ImageTrainConfig, preprocessing: Preprocessing) -> None:
        if (
            config.image_size is None
            or config.crop is None
            or config.flip is None
            or config.turn is None
            or config.mixup is None
        ):
            raise ValueError("the configuration has values left open; pass config.resolved()")
        self._images, self._classes, self._config = data.train, len(data.classes), config
        self._size, self._crop, self._flip, self._turn = config.image_size, config.crop, config.flip, config.turn
        self._preprocessing = preprocessing
        self._permuted: tuple[int, npt.NDArray[np.int64]] | None = None

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, S, S)`` and targets ``(B, classes)`` of the step."""
        count, seed = self._config.batch_size, self._config.seed
        views, labels = [], []
        for position in range(step * count, (step + 1) * count):
            index = self._index(position)
            generator = np.random.default_rng([seed, _VIEW, position])
            image = self._images.read(index)
            views.append(augment(image, self._size, generator, crop=self._crop, flip=self._flip, turn=self._turn))
            labels.append(int(self._images.labels[index]))
        images = torch.from_numpy(self._preprocessing(views))
        targets = soft_targets(torch.tensor(labels), self._classes, self._config.label_smoothing)
        return self._mix(images, targets, np.random.default_rng([seed, _MIXTURE, step]))

    def epoch(self, step: int) -> float:
        """How often the images have been read before the step."""
        return step * self._config.batch_size / len(self._images.labels)

    def _index(self, position: int) -> int:
        epoch, within = divmod(position, len(self._images.labels))
        if self._permuted is None or self._permuted[0] != epoch:
            order = np.random.default_rng([self._config.seed, _ORDER, epoch]).permutation(len(self._images.labels))
            self._permuted = (epoch, order)
        return int(self._permuted[1][within])

    def _mix(self, images: Tensor, targets: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        kinds = [kind for kind in ("mixup", "cutmix") if getattr(self._config, kind) > 0]
        if not kinds:
            return images, targets
        kind = kinds[int(generator.integers(len(kinds)))]
        alpha = getattr(self._config, kind)
        share = float(generator.beta(alpha, alpha))
        if kind == "mixup":
            return mixup(images, targets, share)
        side = round(self._size * float(np.sqrt(1 - share)))
        top, left = (int(at) for at in generator.integers(0, self._size - side + 1, 2))
        return cutmix(images, targets, (top, left, top + side, left + side))
