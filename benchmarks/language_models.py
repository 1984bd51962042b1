"""RWKV-4, RWKV-7, Mamba and a transformer of the same size, trained for the same time on the same text.

    python -m benchmarks.language_models --data gcide.txt.xz --minutes 20 --out benchmarks/results/DATE-models-cpu.json

Same windows in the same order, same batch, same optimiser and schedule (a cosine over the time given); the model is
what differs, with RWKV's pull on the largest logit as part of RWKV. The first 95 % of the text are trained on. The rest
is scored at the end: by the recurrent models in streams that carry their state from end to end; by the transformer,
which has none to carry, in windows of its context whose later half counts: each byte has half a context before it.

A run keeps each model's progress in ``--work`` every minute. Broken off, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import statewise
from benchmarks.machine import describe
from benchmarks.plot import COMPRESSORS, curves_table, draw_curves
from benchmarks.transformer import Transformer, TransformerConfig
from statewise.files import atomic_write
from statewise.text import Corpus, compressor_bits_per_byte, load_corpus
from statewise.training import language_model_loss
from statewise.training.config import TrainConfig
from statewise.training.data import Windows
from statewise.training.optimizer import build_optimizer, set_learning_rate
from statewise.training.validation import validation_bits

MODELS = ("rwkv4", "rwkv7", "mamba", "transformer")

_WARMUP_STEPS = 50
_STEPS_A_POINT = 20
_SECONDS_BETWEEN_SAVES = 60.0
_ROWS = 16  # streams or windows scored side by side


def build(name: str, layers: int, width: int) -> nn.Module:
    """About ``13 · layers · width²`` parameters; Mamba's blocks are half as large, so it gets twice as many."""
    if name == "transformer":
        return Transformer(TransformerConfig(256, layers, width))
    return statewise.create(name, vocab_size=256, num_layers=_depth(name, layers), width=width)


def _depth(name: str, layers: int) -> int:
    return 2 * layers if name == "mamba" else layers


def windowed_bits(model: nn.Module, data: npt.NDArray[np.uint8], context: int) -> float:
    """Bits a byte of all but the first byte, in windows of ``context`` that move on by half of it.

    A window's later half is scored, the first window's whole.

    Raises:
        ValueError: fewer than 2 bytes, or a context that has no half.
    """
    if len(data) < 2 or context % 2:
        raise ValueError(f"data has {len(data)} bytes, context is {context}; 2 or more, and an even one are accepted")
    half = context // 2
    device = next(model.parameters()).device
    nats, count = 0.0, 0

    def score(windows: list[npt.NDArray[np.uint8]], skip: int) -> None:
        nonlocal nats, count
        ids = torch.from_numpy(np.stack(windows).astype(np.int64)).to(device)
        logits, _ = model(ids[:, :-1])
        targets = ids[:, 1 + skip :]
        nats += float(language_model_loss(logits[:, skip:], targets).double()) * targets.numel()
        count += targets.numel()

    later = [data[start : start + context + 1] for start in range(half, len(data) - 1 - half, half)]
    model.eval()
    with torch.no_grad():
        score([data[: context + 1]], 0)
        for at in range(0, len(later) - 1, _ROWS):
            score(later[at : min(at + _ROWS, len(later) - 1)], half)
        if later:
            score(later[-1:], half)  # as short as the text leaves it
    return nats / math.log(2) / count


def run_model(name: str, corpus: Corpus, settings: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """Train ``name`` for the time given, score it, and tell what was measured; goes on from ``work``."""
    path = work / f"{name}.pt"
    torch.manual_seed(settings["seed"])
    model = build(name, settings["layers"], settings["width"]).to(settings["device"])
    optimizer = build_optimizer(model, _recipe(settings))
    batches = Windows(
        corpus.train, batch_size=settings["batch_size"], context=settings["context"], seed=settings["seed"]
    )
    budget, spent, step, curve = settings["minutes"] * 60, 0.0, 0, []
    recent: list[float] = []
    if path.exists():
        saved = torch.load(path, map_location=settings["device"], weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        spent, step, curve, recent = (saved[key] for key in ("spent", "step", "curve", "recent"))

    def save() -> None:
        progress = {"spent": spent, "step": step, "curve": curve, "recent": recent}
        whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **progress}
        atomic_write(path, lambda file: torch.save(whole, file))

    model.train()
    saved_at = spent
    while spent < budget:
        began = time.perf_counter()
        warm = min(1.0, (step + 1) / _WARMUP_STEPS)
        rate = settings["learning_rate"] * warm * (0.55 + 0.45 * math.cos(math.pi * spent / budget))
        set_learning_rate(optimizer, rate)
        batch = batches.read(step)
        logits, _ = model(batch.inputs.to(settings["device"]))
        pull = 1e-4 if name.startswith("rwkv") else 0.0
        loss = language_model_loss(logits, batch.targets.to(settings["device"]), l2wrap=pull)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        recent.append(loss.item() / math.log(2))
        spent, step = spent + time.perf_counter() - began, step + 1
        if len(recent) == _STEPS_A_POINT:
            bits = sum(recent) / len(recent)
            curve.append({"seconds": round(spent, 1), "step": step, "bits_per_byte": round(bits, 4)})
            recent.clear()
            print(f"{name}: {spent:6.0f} s, step {step}, {bits:.3f} bits/byte", flush=True)
        if spent - saved_at > _SECONDS_BETWEEN_SAVES or spent >= budget:
            save()
            saved_at = spent
    test = corpus.test[: settings["test_bytes"]]
    if name == "transformer":
        score = windowed_bits(model, test, settings["context"])
    else:
        score = validation_bits(model, test, rows=_ROWS, context=settings["context"], limit=len(test))
    tokens = step * settings["batch_size"] * settings["context"]
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "layers": _depth(name, settings["layers"]),
        "steps": step,
        "tokens": tokens,
        "epochs": round(batches.epoch(step), 3),
        "seconds": round(spent, 1),
        "tokens_per_second": round(tokens / spent),
        "test_bits_per_byte": round(score, 4),
        "curve": curve,
        "machine": describe(),
    }


def _recipe(settings: Mapping[str, Any]) -> TrainConfig:
    """AdamW, the same for all; of what a run's configuration says, only the optimiser's part is read."""
    return TrainConfig(learning_rate=settings["learning_rate"], weight_decay=0.01, betas=(0.9, 0.99), eps=1e-8)


def compressors(train: npt.NDArray[np.uint8], test: npt.NDArray[np.uint8]) -> dict[str, float]:
    """Bits a byte of ``test``, by compressors that have read ``train`` first."""
    whole = np.concatenate([train, test])
    before, after = compressor_bits_per_byte(train), compressor_bits_per_byte(whole)
    return {name: (after[name] * len(whole) - before[name] * len(train)) / len(test) for name in COMPRESSORS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.language_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="a text, packed or plain")
    parser.add_argument("--models", default=",".join(MODELS), help="in this order")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, each")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="peak; falls to a tenth")
    parser.add_argument("--test-bytes", type=int, help="score no more than the first bytes of the test split")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/language-models"), help="folder for what is under way")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="JSON", help="a plot of the same name goes beside it"
    )
    options = parser.parse_args(arguments)
    names = options.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"--models: {unknown[0]!r}; {', '.join(MODELS)} are accepted")
    torch.set_num_threads(options.threads)
    corpus = load_corpus(options.data, split=(0.95, 0.0))
    settings = {key: value for key, value in vars(options).items() if key not in ("models", "work", "out")}
    settings |= {
        "data": Path(options.data).name,
        "data_sha256": corpus.sha256,
        "test_bytes": len(corpus.test[: options.test_bytes]),
    }
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _claim(options.work, settings, parser)
    results = []
    for name in names:
        path = options.work / f"{name}.json"
        if not path.exists():
            atomic_write(path, json.dumps(run_model(name, corpus, settings, options.work)) + "\n")
        results.append(json.loads(path.read_text("utf-8")))
        print(f"{name}: test {results[-1]['test_bits_per_byte']} bits/byte", flush=True)
    known = options.work / "compressors.json"
    if not known.exists():
        atomic_write(known, json.dumps(compressors(corpus.train, corpus.test[: options.test_bytes])) + "\n")
    document = {
        "kind": "language-models",
        "machine": describe(),
        "settings": settings,
        "compressors": json.loads(known.read_text("utf-8")),
        "results": results,
    }
    atomic_write(options.out, json.dumps(document, indent=1) + "\n")
    draw_curves(document, options.out.with_suffix(".png"))
    print("\n" + curves_table(document), end="")


def _claim(work: Path, settings: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    """What lies in ``work`` must come from the same settings, or the curves would not be comparable."""
    path = work / "settings.json"
    if not path.exists():
        atomic_write(path, json.dumps(settings, indent=1) + "\n")
        return
    before = json.loads(path.read_text("utf-8"))
    for name, value in settings.items():
        if before.get(name) != value:
            parser.error(
                f"--work {work} holds a run with {name} {before.get(name)!r}, not {value!r}; give another folder"
            )


if __name__ == "__main__":
    main()
