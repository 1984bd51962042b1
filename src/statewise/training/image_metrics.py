"""How well a classifier does on a whole set of images, and pictures of it.

Legend: n classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from statewise.files import atomic_write
from statewise.images import LabelledImages, Preprocessing
from statewise.training.metrics import Record

__all__ = ["Accuracy", "draw_confusion", "draw_image_curves", "measure_accuracy"]


class Accuracy(NamedTuple):
    """``loss``: mean cross-entropy in nats; ``top1`` and ``top5``: shares of the images whose label has the largest
    logit, or is among the five largest; ``confusion``: ``(n, n)`` counts, by label and by prediction."""

    loss: float
    top1: float
    top5: float
    confusion: npt.NDArray[np.int64]


@torch.no_grad()
def measure_accuracy(
    model: nn.Module,
    images: LabelledImages,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    device: torch.device | None = None,
    autocast: bool = False,
) -> Accuracy:
    """Classify every image once, without augmentation; the model is left in the mode it was in.

    Args:
        model: ``images (B, C, S, S) → logits (B, n)``.
        images: their labels are from 0 to n - 1.
        preprocessing: what the model reads.
        batch_size: costs memory; changes no more than the last bits.
        device: the model's; ``None`` means the CPU.
        autocast: run in bfloat16.

    Raises:
        ValueError: no images, or a label that the model has no logit for.
    """
    device = device or torch.device("cpu")
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    count = len(images.labels)
    if not count:
        raise ValueError("there are no images to measure on")
    was_training = model.training
    model.eval()
    loss, right, near = 0.0, 0, 0
    confusion: npt.NDArray[np.int64] | None = None
    for start in range(0, count, batch_size):
        numbers = range(start, min(count, start + batch_size))
        batch = torch.from_numpy(preprocessing([images.read(number) for number in numbers])).to(device, dtype)
        labels = torch.from_numpy(images.labels[start : numbers.stop]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = model(batch)
        classes = logits.shape[1]
        if int(labels.max()) >= classes:
            raise ValueError(f"an image has label {int(labels.max())}; the model knows 0..{classes - 1}")
        loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
        first = logits.topk(min(5, classes), 1).indices
        hits = first == labels[:, None]
        right, near = right + int(hits[:, 0].sum()), near + int(hits.sum())
        if confusion is None:
            confusion = np.zeros((classes, classes), np.int64)
        np.add.at(confusion, (labels.cpu().numpy(), first[:, 0].cpu().numpy()), 1)
    model.train(was_training)
    assert confusion is not None
    return Accuracy(loss / count, right / count, near / count, confusion)


def draw_image_curves(records: Sequence[Record], path: Path, title: str) -> None:
    """Loss and accuracy against steps, side by side, as a PNG that appears whole or not at all; nothing from none."""
    if not records:
        return
    figure, canvas = _figure((11, 4.2))
    left, right = figure.subplots(1, 2)
    measured = [record for record in records if "test_top1" in record]
    steps = [record["step"] for record in measured]
    left.plot([r["step"] for r in records], [r["loss"] for r in records], label="training", linewidth=1.2)
    left.set(xlabel="step", ylabel="loss (nats)")
    if measured:
        left.plot(steps, [record["test_loss"] for record in measured], "o-", label="test", markersize=4)
        for name in ("top1", "top5"):
            right.plot(steps, [100 * r[f"test_{name}"] for r in measured], "o-", label=f"test {name}", markersize=4)
        right.legend()
    right.set(xlabel="step", ylabel="accuracy (%)")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    atomic_write(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=120))


def draw_confusion(confusion: npt.NDArray[np.int64], classes: Sequence[str], path: Path, title: str) -> None:
    """Which class is taken for which, in shares of each row's images, as a PNG; counts are written up to 20 classes."""
    count = len(confusion)
    side = min(12.0, 3.0 + 0.45 * count)
    figure, canvas = _figure((side + 1, side))
    axes = figure.add_subplot()
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), ax=axes, label="share of the class")
    if count <= 20:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=shade, fontsize=8)
    if count <= 60:
        names = [classes[number] if number < len(classes) else str(number) for number in range(count)]
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
    axes.set(xlabel="predicted", ylabel="label", title=title)
    atomic_write(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=120))


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    # Neither pyplot nor its global state: a library must not choose the caller's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, FigureCanvasAgg(figure)
