"""Models of images over the size of the image, beside a ViT of their size: time and memory, forward and training.

    python -m benchmarks.vision --out benchmarks/results/DATE-vision-cpu.json

Real sizes: the tiny models of 5 to 7 million parameters, patches of 16, one image at a time. Contestants run
interleaved, medians are told; memory is the peak of the resident set above what it was before, of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.plot import draw_images
from benchmarks.vit import ViT
from statewise.files import atomic_write
from statewise.ops.memory import keep_freed_memory
from statewise.testing.memory import resident_peak

SIZES = ("224x224", "384x320", "512x512", "768x768", "1024x1024", "1536x1536")


def _models(names: Sequence[str]) -> dict[str, nn.Module]:
    import statewise

    torch.manual_seed(0)
    return {name: ViT() if name == "vit_tiny" else statewise.create(name) for name in names}


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        model.eval()(images)


def _training(model: nn.Module, images: Tensor) -> None:
    model.train()
    model.zero_grad(set_to_none=True)
    torch.autograd.backward(model(images).float().square().mean())


_TASKS: dict[str, Callable[[nn.Module, Tensor], None]] = {"forward": _forward, "forward + backward": _training}


def measure(models: dict[str, nn.Module], images: Tensor, task: str, autocast: bool, repeats: int) -> list[Any]:
    """Milliseconds and MiB of each model at one size."""

    def run(model: nn.Module) -> None:
        half = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with half:
            _TASKS[task](model, images)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        run(model)
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            run(model)
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, model in models.items():
        model.zero_grad(set_to_none=True)
        before = resident_peak(reset=True)
        run(model)
        after = resident_peak(reset=False)
        rows.append(
            {
                "who": name,
                "task": task,
                "precision": "bfloat16 autocast" if autocast else "float32",
                "image": f"{images.shape[2]}x{images.shape[3]}",
                "tokens": (images.shape[2] // 16) * (images.shape[3] // 16),
                "ms": round(1e3 * statistics.median(seconds[name]), 2),
                "range": [round(1e3 * pick(seconds[name]), 2) for pick in (min, max)],
                "peak_mib": None if before is None or after is None else round((after - before) / 2**20, 1),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: ms (and MiB) over the size of the image, and the ratio to the ViT's time."""
    lines = []
    for task, precision in dict.fromkeys((row["task"], row["precision"]) for row in rows):
        mine = [row for row in rows if (row["task"], row["precision"]) == (task, precision)]
        images = list(dict.fromkeys(row["image"] for row in mine))
        cells = {(row["who"], row["image"]): row for row in mine}
        lines += [f"| {task}, {precision} | {' | '.join(images)} |", "|---" * (len(images) + 1) + "|"]
        for who in dict.fromkeys(row["who"] for row in mine):
            values = []
            for image in images:
                row, yardstick = cells[who, image], cells.get(("vit_tiny", image))
                ratio = f" ({yardstick['ms'] / row['ms']:.2f}x)" if yardstick and who != "vit_tiny" else ""
                memory = "" if row["peak_mib"] is None else f", {row['peak_mib']:.0f} MiB"
                values.append(f"{row['ms']:.0f} ms{ratio}{memory}")
            lines.append(f"| {who} | {' | '.join(values)} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.vision", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="vit_tiny,vrwkv_tiny,vim_tiny")
    parser.add_argument("--sizes", default=",".join(SIZES), help="HEIGHTxWIDTH, multiples of 16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    models = _models(options.models.split(","))
    document: dict[str, Any] = {"kind": "vision", "machine": describe(), "repeats": options.repeats, "rows": []}
    document["parameters"] = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for precision in options.precisions.split(","):
        for task in _TASKS:
            for size in options.sizes.split(","):
                height, width = map(int, size.split("x"))
                images = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
                rows = measure(models, images, task, precision == "bfloat16", options.repeats)
                document["rows"] += rows
                print("  ".join(f"{row['who']} {row['ms']:.0f} ms" for row in rows), task, precision, size, flush=True)
                if options.out is not None:
                    document["load_after"] = round(os.getloadavg()[0], 2)
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(options.out, json.dumps(document, indent=1) + "\n")
    if options.out is not None:
        draw_images(document, options.out.with_suffix(".png"))
    print("\n" + table(document["rows"]))


if __name__ == "__main__":
    main()
