"""The segmentation example learns shapes that it has not seen, and measures that rightly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples.segmentation import CLASSES, SIDE, VALIDATION_SEED, intersection_over_union, main, scenes


class _Answers(nn.Module):
    """Says what it is told to, scene after scene."""

    def __init__(self, classes: Tensor) -> None:
        super().__init__()
        self.classes, self.at = classes, 0

    def forward(self, images: Tensor) -> Tensor:
        mine = self.classes[self.at : self.at + len(images)]
        self.at += len(images)
        return nn.functional.one_hot(mine, len(CLASSES)).movedim(-1, 1).float()


def test_intersection_over_union() -> None:
    _, classes = scenes(20, torch.Generator().manual_seed(VALIDATION_SEED))
    assert classes.unique().tolist() == [0, 1, 2, 3]
    assert classes.shape == (20, SIDE, SIDE)
    assert intersection_over_union(_Answers(classes), 20).tolist() == [1.0] * 4
    swapped = torch.where(classes == 1, 2, torch.where(classes == 2, 1, classes))
    assert intersection_over_union(_Answers(swapped), 20).tolist() == [1.0, 0.0, 0.0, 1.0]
    half = classes.clone()
    half[:, : SIDE // 2] = 0
    found = intersection_over_union(_Answers(half), 20)
    for kind in (1, 2, 3):
        kept = (classes[:, SIDE // 2 :] == kind).sum() / (classes == kind).sum()
        assert found[kind].item() == pytest.approx(kept.item(), abs=1e-6)


@pytest.mark.parametrize("name", ["vrwkv6", "vim"])
def test_every_backbone_runs(name: str) -> None:
    mean = main(["--model", name, "--steps", "2", "--batch-size", "2", "--width", "64", "--num-layers", "1"])
    assert 0 <= mean < 0.5


@pytest.mark.long
def test_shapes_are_told_apart_on_unseen_scenes() -> None:
    assert main(["--steps", "150"]) > 0.7
