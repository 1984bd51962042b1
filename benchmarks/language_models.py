"""RWKV-4, RWKV-7, Mamba and a transformer of the same size, trained for the same time on the same text.

    python -m benchmarks.language_models --data gcide.txt.xz --split 37954704,37954704 --minutes 20 --out FOLDER

Same windows in the same order, same batch, same optimiser and schedule (a cosine over the time given); only the model
differs. Every model's result is written when it is done, so that a broken-off run goes on with the next. At the end the
test split is scored: with the state carried for the recurrent models, and for the transformer, which has none, in
windows of its context whose second half counts (each byte has at least half a context before it).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import statewise
from benchmarks.ops import machine
from benchmarks.transformer import Transformer, TransformerConfig
from statewise.files import atomic_write
from statewise.text import compressor_bits_per_byte, load_corpus
from statewise.training import language_model_loss
from statewise.training.config import TrainConfig
from statewise.training.data import Windows
from statewise.training.optimizer import build_optimizer, set_learning_rate
from statewise.training.validation import validation_bits

MODELS = ("rwkv4", "rwkv7", "mamba", "transformer")


def build(name: str, layers: int, width: int) -> nn.Module:
    """About ``12 · layers · width²`` parameters; a Mamba block is half as large, so there are twice as many."""
    if name == "transformer":
        return Transformer(TransformerConfig(256, layers, width))
    return statewise.create(name, vocab_size=256, num_layers=layers * (2 if name == "mamba" else 1), width=width)


def transformer_bits(model: nn.Module, data: np.ndarray[Any, Any], context: int, rows: int) -> float:
    """Bits a byte of ``data`` in half-overlapping windows, the later half of each scored."""
    half = context // 2
    starts = range(0, max(1, len(data) - half - 1), half)
    nats, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for at in range(0, len(starts), rows):
            windows = [data[s : s + context + 1] for s in starts[at : at + rows]]
            for group in _equal(windows):
                ids = torch.from_numpy(np.stack(group).astype(np.int64))
                logits, _ = model(ids[:, :-1])
                skip = half
                targets = ids[:, 1 + skip :]
                nats += float(language_model_loss(logits[:, skip:], targets)) * targets.numel()
                count += targets.numel()
    return nats / math.log(2) / count


def _equal(windows: list[np.ndarray[Any, Any]]) -> list[list[np.ndarray[Any, Any]]]:
    """Windows grouped by length: the last of a text is shorter."""
    sizes = sorted({len(w) for w in windows})
    return [[w for w in windows if len(w) == size] for size in sizes]


def train(name: str, corpus: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train for the time given; what was measured."""
    torch.manual_seed(options.seed)
    model = build(name, options.layers, options.width)
    recipe = TrainConfig(
        model="rwkv7",  # only the optimiser's part is read, and it is given in full
        learning_rate=options.learning_rate,
        final_learning_rate=options.learning_rate / 10,
        schedule="cosine",
        weight_decay=0.01,
        betas=(0.9, 0.99),
        eps=1e-8,
        l2wrap=0.0,
    )
    optimizer = build_optimizer(model, recipe)
    batches = Windows(corpus.train, batch_size=options.batch_size, context=options.context, seed=options.seed)
    budget, curve, recent = options.minutes * 60, [], []
    spent, step = 0.0, 0
    while spent < budget:
        began = time.perf_counter()
        rate = options.learning_rate * min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * spent / budget))
        set_learning_rate(optimizer, rate)
        batch = batches.read(step)
        logits, _ = model(batch.inputs)
        loss = language_model_loss(logits, batch.targets, l2wrap=1e-4 if name.startswith("rwkv") else 0.0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        spent, step = spent + time.perf_counter() - began, step + 1
        recent.append(loss.item() / math.log(2))
        if len(recent) == 20:
            curve.append({"seconds": round(spent, 1), "step": step, "bits_per_byte": round(float(np.mean(recent)), 4)})
            recent.clear()
            if step % 100 == 0:
                print(f"{name}: {spent:.0f} s, step {step}, {curve[-1]['bits_per_byte']:.3f} bits/byte", flush=True)
    test = corpus.test[: options.test_bytes]
    if name == "transformer":
        bits = transformer_bits(model, test, options.context, rows=16)
    else:
        bits = validation_bits(model, test, rows=16, context=options.context, limit=len(test))
    tokens = step * options.batch_size * options.context
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": options.layers * (2 if name == "mamba" else 1),
        "steps": step,
        "tokens": tokens,
        "tokens_per_second": round(tokens / spent),
        "test_bits_per_byte": round(bits, 4),
        "test_bytes": len(test),
        "curve": curve,
        "machine": machine(),
    }


def draw_plot(results: list[dict[str, Any]], yardsticks: dict[str, float], path: Path) -> None:
    """Training bits per byte over time, the test score at the end of each curve."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for result in results:
        minutes = [point["seconds"] / 60 for point in result["curve"]]
        label = f"{result['model']}: test {result['test_bits_per_byte']:.3f}, {result['parameters'] / 1e6:.1f} M"
        axis.plot(minutes, [point["bits_per_byte"] for point in result["curve"]], label=label, linewidth=1.3)
    for name, bits in yardsticks.items():
        axis.axhline(bits, color="grey", linestyle="--", linewidth=0.8)
        axis.text(0, bits, f" {name} {bits:.2f}", fontsize=8, va="bottom", color="grey")
    axis.set(xlabel="minutes of training on this CPU", ylabel="bits per byte", ylim=(1.4, 4.5))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", help="two byte offsets, where train and valid end")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--test-bytes", type=int, default=None, help="score only the first bytes of the test split")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for MODEL.json, summary.json and curves.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    split = None if options.split is None else tuple(int(value) for value in options.split.split(","))
    corpus = load_corpus(options.data, split=split)
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for name in options.models.split(","):
        path = options.out / f"{name}.json"
        if not path.exists():
            atomic_write(path, json.dumps(train(name, corpus, options), indent=1) + "\n")
        results.append(json.loads(path.read_text()))
        print(f"{name}: test {results[-1]['test_bits_per_byte']} bits/byte", flush=True)
    yardsticks = compressor_bits_per_byte(corpus.test[: options.test_bytes])
    summary = {
        "settings": {key: str(value) for key, value in vars(options).items()} | {"data": Path(options.data).name},
        "yardsticks_test_alone": yardsticks,
        "results": [{key: value for key, value in result.items() if key != "curve"} for result in results],
    }
    atomic_write(options.out / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_plot(results, {key: yardsticks[key] for key in ("gzip", "xz")}, options.out / "curves.png")


if __name__ == "__main__":
    main()
