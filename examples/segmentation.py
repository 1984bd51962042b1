"""Semantic segmentation with a backbone of this package and a head in the style of UPerNet, on generated scenes.

    python examples/segmentation.py --model vrwkv --steps 300

Scenes are discs, bars and triangles of random bright colours over dark noise; what is to be told is which shape a pixel
belongs to, which its colour does not say. Training scenes are drawn anew at every step from one stream of random
numbers, validation scenes come from another and are never trained on. Told is the mean over classes of intersection
over union (mIoU).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import statewise
from statewise.bridges.detection import FeaturePyramid

SIDE = 64
CLASSES = ("background", "disc", "bar", "triangle")
WEIGHTS = torch.tensor([0.25, 1.0, 1.0, 1.0])  # four of five pixels are background
VALIDATION_SEED = 1_000_003


def scenes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, SIDE, SIDE)`` and the class of every pixel ``(count, SIDE, SIDE)``."""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images = 0.2 + 0.1 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    classes = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    for image, labels in zip(images, classes, strict=True):
        for kind in torch.randint(1, len(CLASSES), (2,), generator=generator).tolist():
            middle = torch.randint(8, SIDE - 8, (2,), generator=generator)
            size = int(torch.randint(9, 17, (1,), generator=generator))
            down, right = rows - middle[0], columns - middle[1]
            mask = (
                down**2 + right**2 <= size**2,
                (down.abs() <= size) & (right.abs() <= size // 2),
                (down <= size) & (down >= 2 * right.abs() - size),
            )[kind - 1]
            image[:, mask] = 0.5 + 0.5 * torch.rand(3, 1, generator=generator)
            labels[mask] = kind
    return (images - 0.5) / 0.3, classes


class UPerHead(nn.Module):
    """Pooled context on the coarsest map, added down to the finest, all levels read together (Xiao et al. 2018,
    arXiv 1807.10221)."""

    def __init__(self, channels: int, num_classes: int, levels: int = 4, pools: tuple[int, ...] = (1, 2, 3)) -> None:
        super().__init__()
        self.pools = pools
        self.context = nn.Conv2d(channels * (1 + len(pools)), channels, 3, padding=1)
        self.smooth = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(levels))
        self.fuse = nn.Sequential(
            nn.Conv2d(channels * levels, channels, 3, padding=1), nn.GELU(), nn.Conv2d(channels, num_classes, 1)
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps ``(B, C, ...)`` from the finest to the coarsest → logits ``(B, classes, ...)`` of the finest's size."""

        def to(x: Tensor, like: Tensor) -> Tensor:
            return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

        last = maps[-1]
        pooled = [to(F.adaptive_avg_pool2d(last, size), last) for size in self.pools]
        merged = [F.gelu(self.context(torch.cat([last, *pooled], 1)))]
        for finer in reversed(maps[:-1]):
            merged.insert(0, finer + to(merged[0], finer))
        smooth = [to(F.gelu(layer(x)), maps[0]) for layer, x in zip(self.smooth, merged, strict=True)]
        logits: Tensor = self.fuse(torch.cat(smooth, 1))
        return logits


class Segmenter(nn.Module):
    """Images → logits of every pixel."""

    def __init__(self, architecture: str, width: int, num_layers: int) -> None:
        super().__init__()
        model = statewise.create(architecture, width=width, num_layers=num_layers, image_size=SIDE, patch_size=8)
        self.pyramid = FeaturePyramid(model, out_channels=width // 2)
        self.head = UPerHead(width // 2, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """``(B, 3, height, width)`` → ``(B, classes, height, width)``."""
        maps = self.pyramid(images)
        logits = self.head([maps[str(level)] for level in range(4)])
        return F.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def intersection_over_union(model: nn.Module, count: int) -> Tensor:
    """Of every class, over all pixels of ``count`` validation scenes."""
    images, classes = scenes(count, torch.Generator().manual_seed(VALIDATION_SEED))
    model.eval()
    found = torch.cat([model(part).argmax(1) for part in images.split(16)])
    model.train()
    pairs = torch.bincount((classes * len(CLASSES) + found).flatten(), minlength=len(CLASSES) ** 2)
    table = pairs.reshape(len(CLASSES), -1).double()
    shared = table.diagonal()
    return shared / (table.sum(0) + table.sum(1) - shared)


def main(arguments: list[str] | None = None) -> float:
    """Train, tell, and return the mIoU on validation scenes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("vrwkv", "vrwkv6", "vim"), default="vrwkv")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.manual_seed(given.seed)
    stream = torch.Generator().manual_seed(given.seed)
    model = Segmenter(given.model, given.width, given.num_layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, given.lr, total_steps=given.steps)
    started = time.monotonic()
    for step in range(1, given.steps + 1):
        images, classes = scenes(given.batch_size, stream)
        loss = F.cross_entropy(model(images), classes, WEIGHTS)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 25 == 0 or step == given.steps:
            print(f"step {step:5d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)
    found = intersection_over_union(model, 64)
    for name, value in zip(CLASSES, found.tolist(), strict=True):
        print(f"{name:>10}  IoU {value:.3f}")
    mean = found.mean().item()
    print(f"mIoU {mean:.3f} on 64 scenes that were not trained on")
    return mean


if __name__ == "__main__":
    main()
