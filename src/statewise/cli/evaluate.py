"""``statewise evaluate``: bits per byte over a whole split, beside what needs no neural network; of a classifier of
images, how many it tells rightly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from statewise.cli import COMMANDS
from statewise.cli.options import Dtype, from_arguments

if TYPE_CHECKING:
    from statewise.text import Tokenizer

__all__ = ["Options", "main", "yardsticks"]


@dataclass(frozen=True)
class Options:
    """What the command line may say."""

    checkpoint: Annotated[
        str, "a checkpoint file or directory, a run's folder (its latest snapshot), or hf://owner/name"
    ]
    data: Annotated[
        str | None,
        "stdlib, enwik8, a file or a folder; of images digits, .npz or folder; by default what the run learnt from",
    ] = None
    split: Annotated[Literal["train", "valid", "test"], "which part of the data"] = "test"
    window: Annotated[int, "tokens read at a time (images: one for 16); costs memory, changes no result"] = 1024
    tokenizer: Annotated[str | None, "bytes, rwkv-world, or a file; by default what the model was trained with"] = None
    yardsticks: Annotated[bool, "tell gzip's and xz's bits per byte and the entropies of the same bytes too"] = True
    device: Annotated[str, "where to run"] = "cpu"
    dtype: Annotated[Dtype, "precision of the model"] = "float32"
    json: Annotated[bool, "print one JSON document"] = False


def main(arguments: Sequence[str]) -> int:
    """Run the command; see :func:`statewise.cli.main`."""
    options = from_arguments(Options, arguments, prog="statewise evaluate", description=COMMANDS["evaluate"])
    from statewise.cli.checkpoints import DTYPES, find_device, locate, open_model, tokenizer_for
    from statewise.cli.console import print_json, print_table, progress
    from statewise.inference import evaluate_bits_per_byte
    from statewise.text import load_corpus

    place = locate(options.checkpoint)
    if _is_of_images(place):
        return _images(options, place)
    opened = open_model(options.checkpoint, device=find_device(options.device), dtype=DTYPES[options.dtype])
    source = options.data or (opened.run.data if opened.run is not None else None)
    if source is None:
        raise ValueError("--data is needed: this checkpoint is of no run, so nothing tells what to evaluate on")
    tokenizer = tokenizer_for(opened, options.tokenizer)
    # A run may have cut its own data in its own way; what it has not seen lies behind that cut.
    cut = opened.run.split if opened.run is not None and source == opened.run.data else None
    corpus = load_corpus(source, split=cut)
    text = getattr(corpus, options.split)
    if not len(text):
        raise ValueError(f"the {options.split} split of {source} is empty")
    tokens = _encode(tokenizer, text, source)
    with progress(len(tokens), "evaluate") as bar:
        found = evaluate_bits_per_byte(
            opened.model,
            tokens,
            window=options.window,
            num_bytes=len(text),
            progress=lambda done, bits: bar(done, f"{bits:.4f} bits/byte"),
        )
    beside = yardsticks(text) if options.yardsticks else {}
    if options.json:
        told = {"checkpoint": str(opened.path), "data": source, "split": options.split, "window": options.window}
        print_json({**told, **found, **beside})
        return 0
    rows = [
        ("model", f"{found['bits_per_byte']:.4f}", f"perplexity {found['perplexity']:.4f} a token"),
        *((_NAMES[name][0], f"{value:.4f}", _NAMES[name][1]) for name, value in beside.items()),
    ]
    title = f"{opened.path} on {source}, {options.split}: {found['bytes']:,} bytes, {found['tokens']:,} tokens"
    print_table(["", "bits per byte", ""], rows, title=title)
    return 0


def _is_of_images(place: Path) -> bool:
    from statewise.images import read_preprocessing
    from statewise.training.image_config import is_image_model
    from statewise.weights import read

    if place.suffix == ".gguf":
        return False
    return (place.is_dir() and read_preprocessing(place) is not None) or is_image_model(
        read(place, mapped=True).architecture
    )


def _images(options: Options, place: Path) -> int:
    from statewise.cli.checkpoints import DTYPES, find_device
    from statewise.cli.classify import open_classifier
    from statewise.cli.console import print_json, print_table
    from statewise.images import load_images
    from statewise.training.image_config import ImageTrainConfig
    from statewise.training.image_metrics import measure_accuracy

    device, dtype = find_device(options.device), DTYPES[options.dtype]
    model, preprocessing = open_classifier(place, device=device, dtype=dtype)
    written = place.parent.parent / "config.toml"
    of_run = place.parent.name == "snapshots" and written.is_file()
    source = options.data or (ImageTrainConfig.from_toml(written).data if of_run else None)
    if source is None:
        raise ValueError("--data is needed: this checkpoint is of no run, so nothing tells what to evaluate on")
    if options.split == "valid":
        raise ValueError("--split is 'valid'; images have train and test")
    data = load_images(source)
    if preprocessing.classes and preprocessing.classes != data.classes:
        raise ValueError(
            f"{source} has the classes {_few(data.classes)}; the model knows {_few(preprocessing.classes)}"
        )
    images = data.train if options.split == "train" else data.test
    found = measure_accuracy(model, images, preprocessing, batch_size=max(1, options.window // 16), device=device)
    count = len(images.labels)
    if options.json:
        told = {"checkpoint": str(place), "data": source, "split": options.split, "images": count}
        numbers = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
        print_json({**told, **numbers, "classes": data.classes, "confusion": found.confusion.tolist()})
        return 0
    rows = [
        ("top-1", f"{100 * found.top1:.2f} %"),
        ("top-5", f"{100 * found.top5:.2f} %"),
        ("loss", f"{found.loss:.4f} nats"),
    ]
    print_table(["", ""], rows, title=f"{place} on {source}, {options.split}: {count:,} images")
    return 0


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f", ... ({len(names)})" if len(names) > 8 else "")


_NAMES = {
    "gzip_bits_per_byte": ("gzip -9", "of this split alone"),
    "xz_bits_per_byte": ("xz -9e", "of this split alone"),
    "order0_bits_per_byte": ("order-0 entropy", "bytes by their frequency in this split"),
    "order1_bits_per_byte": ("order-1 entropy", "the same, given the byte before"),
}


def yardsticks(text: Any) -> dict[str, float]:
    """What the same bytes (a uint8 vector) cost without a neural network, in bits per byte."""
    from statewise.text import compressor_bits_per_byte, order_entropy

    packed = compressor_bits_per_byte(text)
    found = {"gzip_bits_per_byte": packed["gzip"], "xz_bits_per_byte": packed["xz"]}
    return found | {f"order{order}_bits_per_byte": order_entropy(text, order) for order in (0, 1) if len(text) > order}


def _encode(tokenizer: Tokenizer, text: Any, source: str) -> Any:
    """The ids of a uint8 vector, as a vector: bytes are their own ids, the rest is encoded as text."""
    if tokenizer.name == "bytes":
        return text
    import numpy as np

    from statewise.text import decode_text

    return np.asarray(tokenizer.encode(decode_text(text, source)), dtype=np.int64)
