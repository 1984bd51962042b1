"""Whole models on a GPU: training steps beside a transformer of the same size, and decoding in batches.

    python -m benchmarks.gpu_models --out benchmarks/results/DATE-models-gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu_models --rehearse   # the whole of it on a CPU, at toy sizes

Weights are random, of the published sizes. A training step is forward, loss, backward, clipping and fused AdamW on
``--tokens`` tokens cut into rows of the context, under bfloat16 autocast as in ``statewise train --dtype bfloat16``,
without and with compiled blocks. Decoding is one token for every row of the batch, greedily, in bfloat16: told kernel
by kernel, and as a CUDA graph. Its roof is the time that reading all weights, and reading and writing the state, takes
at the speed of a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import Clock, CudaClock, RehearsalClock, describe_gpu, measure_rates
from benchmarks.machine import describe
from benchmarks.plot import draw_decode, models_table
from benchmarks.transformer import Transformer, TransformerConfig
from statewise import models
from statewise.files import atomic_write
from statewise.inference import StepGraph
from statewise.ops import gpu
from statewise.ops.checks import trusting_values
from statewise.state import ModelState
from statewise.training import language_model_loss
from statewise.training.compiled import compile_blocks

__all__ = ["SIZES", "Size", "decode", "empty_model", "main", "train", "transformer_like"]


@dataclasses.dataclass(frozen=True)
class Size:
    """A published model's sizes."""

    name: str
    family: str
    layers: int
    width: int
    vocab: int


SIZES = {
    "training": (
        Size("RWKV-7 0.4B", "rwkv7", 24, 1024, 65536),
        Size("Mamba 130M", "mamba", 24, 768, 50280),
    ),
    "decode": (
        Size("RWKV-7 0.4B", "rwkv7", 24, 1024, 65536),
        Size("RWKV-7 1.5B", "rwkv7", 24, 2048, 65536),
        Size("Mamba 130M", "mamba", 24, 768, 50280),
        Size("Mamba 2.8B", "mamba", 64, 2560, 50280),
    ),
}
CONTEXTS = (1024, 4096, 16384)
BATCHES = (1, 8, 32, 64, 128, 256, 512)
#: Tokens that are decoded in one timing.
DECODED = 16


def toy(size: Size) -> Size:
    """``size`` as an interpreter can bear it."""
    return dataclasses.replace(size, layers=2, width=64, vocab=64)


def empty_model(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """A model of random weights, made where it will run: initialising it properly would take longer than measuring."""
    with torch.device("meta"):
        model = models.create(size.family, vocab_size=size.vocab, num_layers=size.layers, width=size.width)
    model = model.to(dtype).to_empty(device=device)
    if getattr(model.config, "tie_embeddings", False):  # which `to_empty` has parted
        model.lm_head.weight = model.backbone.embedding.weight
    return _fill(model)


def transformer_like(model: nn.Module, size: Size, device: torch.device) -> Transformer:
    """A transformer of the same width, vocabulary and, to within a block, number of parameters."""
    table = (size.vocab, size.width)
    inner = sum(parameter.numel() for parameter in model.parameters() if parameter.shape != table)
    layers = max(1, round(inner / (13 * size.width**2)))
    with torch.device("meta"):
        made = Transformer(TransformerConfig(size.vocab, layers, size.width))
    return _fill(made.to_empty(device=device))


@torch.no_grad()
def _fill(model: Any) -> Any:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        # Norms scale by about one; everything else is as small as a fresh matrix.
        centre = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
        parameter.normal_(centre, 0.02)
    for buffer in model.buffers():
        buffer.zero_()
    return model


def train(
    name: str, model: nn.Module, context: int, rows: int, device: torch.device, clock: Clock, steps: int, how: str
) -> dict[str, Any]:
    """Tokens a second of whole steps, the median of ``steps``."""
    if how == "compiled":
        torch._dynamo.reset()  # of another context: compiled for any length, it would be slower
        compile_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    vocab = model.config.vocab_size
    tokens = torch.randint(vocab, (rows, context + 1), device=device)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with trusting_values():
            with torch.autocast(device.type, torch.bfloat16):
                logits, _ = model(tokens[:, :-1])
            loss = language_model_loss(logits, tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    peak = clock.peak(step)  # compiled and tuned before anything is timed
    loss = step()
    times = [clock.milliseconds(step) for _ in range(steps)]
    if not bool(torch.isfinite(loss)):
        raise RuntimeError(f"the loss is {loss.item()}")
    return {
        "task": "training",
        "model": name,
        "how": how,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "context": context,
        "rows": rows,
        "tokens_per_second": round(1e3 * rows * context / statistics.median(times), 1),
        "ms_range": [round(min(times), 3), round(max(times), 3)],
        "peak_bytes": peak,
    }


def _stepper(model: Any, batch: int, device: torch.device, how: str) -> tuple[Callable[[], object], int]:
    """What decodes ``DECODED`` tokens, and the bytes of the state."""
    state: ModelState = model.init_state(batch)
    held = state.nbytes
    token = torch.randint(model.config.vocab_size, (batch,), device=device)
    if how == "graph":
        graph = StepGraph(model, state)
        del state

        def run() -> object:
            following = token
            for _ in range(DECODED):
                following = graph.step(following).argmax(-1)
            return following

        return run, held

    def plainly() -> object:
        following, now = token, state
        with torch.no_grad(), trusting_values():
            for _ in range(DECODED):
                logits, now = model.step(following, now)
                following = logits.argmax(-1)
        return following

    return plainly, held


def decode(
    size: Size, model: Any, batch: int, device: torch.device, clock: Clock, rates: dict[str, float], how: str
) -> dict[str, Any]:
    """Tokens a second of all rows together, the median of several runs."""
    if how == "graph" and device.type != "cuda":
        raise RuntimeError("a CUDA graph needs a GPU")
    run, held = _stepper(model, batch, device, how)
    run()
    times = [clock.milliseconds(run) for _ in range(7)]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    tables = [parameter.nbytes for parameter in model.parameters() if parameter.shape == (size.vocab, size.width)]
    if len(tables) > 1:  # of the embedding only a few rows are read; a tied one is the head as well
        weights -= tables[0]
    roof = batch * rates["bytes"] / (weights + 2 * held)
    speed = 1e3 * batch * DECODED / statistics.median(times)
    return {
        "task": "decode",
        "model": size.name,
        "how": how,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": batch,
        "state_bytes": held,
        "tokens_per_second": round(speed, 1),
        "ms_range": [round(min(times) / DECODED, 4), round(max(times) / DECODED, 4)],
        "roof": round(roof, 1),
        "of_roof": round(speed / roof, 3),
    }


def _list(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def _numbers(value: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _list(value))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not accepted ends the process with status 2."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=_list, default=("training", "decode"), help="of training, decode")
    parser.add_argument("--models", type=_list, default=(), help="only these, by name, comma separated")
    parser.add_argument("--contexts", type=_numbers, default=CONTEXTS)
    parser.add_argument("--batches", type=_numbers, default=BATCHES)
    parser.add_argument("--tokens", type=int, default=16384, help="of a training step")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--no-compile", action="store_true", help="leave out training with compiled blocks")
    parser.add_argument("--minutes", type=float, default=math.inf, help="nothing is begun after so long")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where results go, after every row")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: beside --out, of the same name")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter, at toy sizes")
    options = parser.parse_args(arguments)
    known = list(dict.fromkeys(size.name for sizes in SIZES.values() for size in sizes))
    for flag, given, accepted in (("--tasks", options.tasks, list(SIZES)), ("--models", options.models, known)):
        for name in given:
            if name not in accepted:
                parser.error(f"{flag}: {name!r}; {', '.join(accepted)} are accepted")
    if options.rehearse and not gpu.interpreting():
        parser.error("--rehearse needs Triton's interpreter: TRITON_INTERPRET=1 in the environment")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse goes through the motions without one")
    if options.rehearse:
        options.contexts, options.batches, options.tokens, options.steps = (32,), (1, 2), 64, 1
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    began = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    clock: Clock = RehearsalClock() if options.rehearse else CudaClock(device)
    rates = measure_rates(clock, device, tiny=options.rehearse)
    document: dict[str, Any] = {
        "kind": "gpu models",
        "rehearsal": options.rehearse,
        "machine": describe() | {"accelerator": describe_gpu(device)},
        "copy_bytes_per_second": round(rates["bytes"]),
        "complete": False,
        "rows": [],
        "left_out": [],
    }

    def keep() -> None:
        document["seconds"] = round(time.perf_counter() - began, 1)
        document["load_after"] = round(os.getloadavg()[0], 2)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")

    def attempt(about: dict[str, Any], work: Callable[[], dict[str, Any]]) -> None:
        label = " ".join(map(str, about.values()))
        if time.perf_counter() - began > 60 * options.minutes:
            document["left_out"].append(label)
            return
        try:
            row = work()
        except Exception as error:  # out of memory above all: told, and the rest goes on
            lines = str(error).strip().splitlines()
            row = {**about, "skipped": f"{type(error).__name__}: {lines[0][:160] if lines else ''}".rstrip(": ")}
        document["rows"].append(row)
        told = row.get("skipped") or f"{row['tokens_per_second']:,.0f} tokens/s"
        print(f"{label:44} {told}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        keep()

    def sizes(task: str) -> list[Size]:
        wanted = SIZES[task] if task in options.tasks else ()
        return [toy(s) if options.rehearse else s for s in wanted if not options.models or s.name in options.models]

    for size in sizes("decode"):  # the quicker half first
        model = empty_model(size, device, torch.bfloat16).eval()
        for batch in options.batches:
            for how in ("graph", "eager"):
                about = {"task": "decode", "model": size.name, "how": how, "batch": batch}
                attempt(about, lambda m=model, s=size, b=batch, h=how: decode(s, m, b, device, clock, rates, h))
        del model
    hows = ["eager"] if options.no_compile or options.rehearse else ["eager", "compiled"]
    for size in sizes("training"):
        for context in options.contexts:
            rows = max(1, options.tokens // context)
            for how in hows:
                for yardstick in (False, True):
                    if yardstick and how == "compiled":
                        continue  # its blocks are a few large kernels as it is
                    name = f"transformer like {size.name}" if yardstick else size.name

                    def work(s: Size = size, c: int = context, r: int = rows, h: str = how, y: bool = yardstick) -> Any:
                        model = empty_model(s, device, torch.float32)
                        model = transformer_like(model, s, device) if y else model
                        label = f"transformer like {s.name}" if y else s.name
                        return train(label, model.train(), c, r, device, clock, options.steps, h)

                    attempt({"task": "training", "model": name, "how": how, "context": context}, work)
    document["complete"] = not document["left_out"]
    keep()
    plot = options.plot or (options.out.with_suffix(".png") if options.out is not None else None)
    if plot is not None:
        draw_decode(document, plot)
    print("\n" + models_table(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
