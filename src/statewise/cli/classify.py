"""``statewise classify``: what images show, and a picture of what the classifier looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from statewise.cli import COMMANDS
from statewise.cli.options import Dtype, from_arguments

if TYPE_CHECKING:
    import torch

    from statewise.images import Preprocessing

__all__ = ["Options", "main", "open_classifier"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    checkpoint: Annotated[
        str, "a checkpoint file or directory, a run's folder (its latest snapshot), or hf://owner/name"
    ]
    images: Annotated[tuple[Path, ...], "image files"]
    top: Annotated[int, "classes told of each image"] = 5
    explain: Annotated[
        Path | None, "draw the first image, the effective receptive field, and (Vision-RWKV) both directions' shares"
    ] = None
    device: Annotated[str, "where to run"] = "cpu"
    dtype: Annotated[Dtype, "precision of the model"] = "float32"
    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise classify", description=COMMANDS["classify"])
    if options.top < 1:
        raise ValueError(f"--top is {options.top}; accepted are integers from 1")
    import torch

    from statewise.cli.checkpoints import DTYPES, find_device
    from statewise.cli.console import print_json, print_table
    from statewise.images import read_image

    device, dtype = find_device(options.device), DTYPES[options.dtype]
    model, preprocessing = open_classifier(options.checkpoint, device=device, dtype=dtype)
    told: list[dict[str, Any]] = []
    first: torch.Tensor | None = None
    for path in options.images:  # one at a time: memory does not grow with their number
        batch = torch.from_numpy(preprocessing([read_image(path, preprocessing.channels)])).to(device, dtype)
        first = batch if first is None else first
        with torch.no_grad():
            chances = model(batch)[0].double().softmax(0)
        best = chances.topk(min(options.top, len(chances)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        classes = [{"class": preprocessing.name(label), "label": label, "probability": p} for label, p in pairs]
        told.append({"image": str(path), "classes": classes})
    if options.explain is not None and first is not None:
        _draw(options.explain, model, first, preprocessing)
    if options.json:
        explained = {} if options.explain is None else {"explain": str(options.explain)}
        print_json({"checkpoint": options.checkpoint, "images": told, **explained})
        return 0
    rows = [
        (entry["image"] if not rank else "", found["class"], f"{100 * found['probability']:.2f} %")
        for entry in told
        for rank, found in enumerate(entry["classes"])
    ]
    print_table(["image", "class", "probability"], rows)
    if options.explain is not None:
        print(f"picture: {options.explain}")
    return 0


def open_classifier(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> tuple[Any, Preprocessing]:
    """A classifier, ready to be read from, and what it reads: as its run wrote down, else as models for ImageNet do.

    Raises:
        ValueError: a model of text, one without a classifier, or one of other images than ``images.json`` says.
        WeightsError, SnapshotError, FileNotFoundError: as ``statewise.load``.
    """
    from statewise.cli.checkpoints import locate
    from statewise.images import Preprocessing, read_preprocessing
    from statewise.models import load
    from statewise.models.vision.backbone import pair

    place = locate(path)
    model: Any = load(place, dtype=dtype)
    if not hasattr(model, "num_classes"):
        raise ValueError(f"{place} holds a model of text; a classifier of images is needed")
    if model.num_classes < 1 or not model.config.global_pool:
        raise ValueError(f"{place} holds a model of images without a classifier")
    written = read_preprocessing(place if place.is_dir() else place.parent)
    if written is None:
        written = Preprocessing.of_imagenet(min(pair("image_size", model.config.image_size)))
    if written.channels != model.config.in_channels or len(written.classes) not in (0, model.num_classes):
        raise ValueError(
            f"{place}: the model reads {model.config.in_channels} channels and tells {model.num_classes} classes; its "
            f"images.json says {written.channels} channels and {len(written.classes)} classes"
        )
    return model.to(device).eval(), written


def _draw(path: Path, model: Any, image: torch.Tensor, preprocessing: Preprocessing) -> None:
    """The image, which pixels its middle knows of, and per block what came from before and from behind."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from statewise.files import atomic_write
    from statewise.inference.receptive_field import direction_shares, effective_receptive_field
    from statewise.models.vision.vision_rwkv import SpatialMix

    field = effective_receptive_field(model, image).numpy()
    shares = []
    if any(isinstance(module, SpatialMix) for module in model.modules()):
        shares = direction_shares(model, image)
    figure = Figure(figsize=(10.5 if shares else 7, 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3 if shares else 2)
    pixels = image[0].float().cpu().numpy().transpose(1, 2, 0) * np.asarray(preprocessing.std) + preprocessing.mean
    panels[0].imshow(np.clip(pixels, 0, 1).squeeze(), cmap="gray", vmin=0, vmax=1)
    panels[0].set(title="what the model is given")
    # Differences of many orders of magnitude; black at a thousandth.
    panels[1].imshow(np.log10(np.maximum(field, 1e-3)), cmap="magma", vmin=-3, vmax=0)
    panels[1].set(title="receptive field of the middle\n(log₁₀, three decades)")
    for panel in panels[:2]:
        panel.set_xticks([])
        panel.set_yticks([])
    if shares:
        means = np.stack([block[0].numpy().mean(1) for block in shares], 1)
        blocks, below = np.arange(1, len(shares) + 1), np.zeros(len(shares))
        for name, values in zip(("before", "itself", "behind"), means, strict=True):
            panels[2].bar(blocks, values, bottom=below, label=name)
            below += values
        panels[2].xaxis.get_major_locator().set_params(integer=True)
        panels[2].set(title="where a token's average comes from", xlabel="block", ylabel="share", ylim=(0, 1))
        panels[2].legend(loc="lower right", fontsize=8)
    atomic_write(path, lambda temporary: canvas.print_figure(temporary, format="png", dpi=130))
