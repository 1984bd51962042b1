"""Whole training steps over context: our models beside a transformer of the same size, and published model code.

    python -m benchmarks.training --out benchmarks/results/DATE-training-cpu.json

A step is forward, loss, backward, clipping and fused AdamW on ``--tokens`` tokens, cut into rows of the context. Steps
are interleaved between models, the first is thrown away, medians are told. The process keeps freed memory, as
`statewise train` does, for all models alike. Published models (``--published``) take a
context of their own, since most would take minutes a step.
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

from benchmarks.language_models import MODELS, build
from benchmarks.machine import describe
from statewise.files import atomic_write
from statewise.ops.memory import keep_freed_memory
from statewise.training import language_model_loss

_ALL = (*MODELS, "mamba-shallow")

Logits = Callable[[Tensor], Tensor]


def _ours(name: str, layers: int, width: int) -> tuple[nn.Module, Logits]:
    model = build(name, layers, width)
    return model, lambda tokens: model(tokens)[0]


def _find(name: str, layers: int, width: int) -> tuple[nn.Module, Logits]:
    """``mamba`` has the parameters of the others, ``mamba-shallow`` their number of layers, and so half of them."""
    if name == "mamba-shallow":
        return _ours("mamba", layers // 2, width)
    return _ours(name, layers, width)


def _transformers_rwkv4(layers: int, width: int) -> tuple[nn.Module, Logits]:
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"attention_hidden_size": width, "intermediate_size": 4 * width, "context_length": 1 << 16}
    config = RwkvConfig(vocab_size=256, hidden_size=width, num_hidden_layers=layers, use_cache=False, **sizes)
    model = RwkvForCausalLM(config)
    return model, lambda tokens: model(tokens).logits


def _transformers_mamba(layers: int, width: int) -> tuple[nn.Module, Logits]:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(
        MambaConfig(vocab_size=256, hidden_size=width, num_hidden_layers=2 * layers, use_cache=False)
    )
    return model, lambda tokens: model(tokens).logits


def _mambapy(layers: int, width: int) -> tuple[nn.Module, Logits]:
    """Its blocks between an embedding and a head: its own language model cannot be imported without mamba_ssm."""
    from mambapy.mamba import Mamba, MambaConfig

    blocks = Mamba(MambaConfig(d_model=width, n_layers=2 * layers))
    model = nn.Sequential(nn.Embedding(256, width), blocks, nn.LayerNorm(width), nn.Linear(width, 256, bias=False))
    return model, model


PUBLISHED: dict[str, Callable[[int, int], tuple[nn.Module, Logits]]] = {
    "transformers rwkv4": _transformers_rwkv4,
    "transformers mamba": _transformers_mamba,
    "mambapy mamba": _mambapy,
}


class _Contestant:
    def __init__(self, name: str, model: nn.Module, logits: Logits) -> None:
        self.name, self.model, self.logits = name, model, logits
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.seconds: list[float] = []

    def step(self, tokens: Tensor, autocast: bool) -> None:
        half = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        start = time.perf_counter()
        with half:
            logits = self.logits(tokens[:, :-1])
        loss = language_model_loss(logits.float(), tokens[:, 1:])
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(f"{self.name}: the loss is {loss.item()}")


def measure(contestants: Sequence[_Contestant], tokens: Tensor, autocast: bool, steps: int) -> list[dict[str, Any]]:
    """Tokens a second of each, the median of ``steps`` interleaved steps."""
    for contestant in contestants:
        contestant.seconds.clear()
        contestant.step(tokens, autocast)
        contestant.seconds.clear()
    for _ in range(steps):
        for contestant in contestants:
            contestant.step(tokens, autocast)
    rows, context = tokens.shape[0], tokens.shape[1] - 1
    return [
        {
            "who": contestant.name,
            "parameters": sum(p.numel() for p in contestant.model.parameters()),
            "context": context,
            "rows": rows,
            "precision": "bfloat16 autocast" if autocast else "float32",
            "tokens_per_second": round(rows * context / statistics.median(contestant.seconds)),
            "range": [round(rows * context / s) for s in (max(contestant.seconds), min(contestant.seconds))],
        }
        for contestant in contestants
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: tokens a second over context, and the ratio to the transformer that read as many rows."""
    lines = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        mine = [row for row in rows if row["precision"] == precision]
        contexts = sorted({row["context"] for row in mine})
        speeds = {(row["who"], row["context"]): row for row in mine}
        lines += [
            f"| {precision} | {' | '.join(f'context {c}' for c in contexts)} |",
            "|---" * (len(contexts) + 1) + "|",
        ]
        for who in dict.fromkeys(row["who"] for row in mine):
            values = []
            for context in contexts:
                row, yardstick = speeds.get((who, context)), speeds.get(("transformer", context))
                if row is None:
                    values.append("–")
                    continue
                speed, ratio = row["tokens_per_second"], ""
                if yardstick and who != "transformer" and row["rows"] == yardstick["rows"]:
                    ratio = f" ({speed / yardstick['tokens_per_second']:.2f}x)"
                values.append(f"{speed}{ratio}")
            lines.append(f"| {who} | {' | '.join(values)} |")
        lines.append("")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(_ALL), help=f"of {', '.join(_ALL)}")
    parser.add_argument("--contexts", default="512,1024,2048,4096")
    parser.add_argument("--tokens", type=int, default=4096, help="a step")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", default="float32,bfloat16")
    parser.add_argument("--published", default="", help=f"of {', '.join(PUBLISHED)}")
    parser.add_argument("--published-context", type=int, default=512)
    parser.add_argument("--out", type=Path, metavar="JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    document: dict[str, Any] = {"kind": "training", "machine": describe(), "steps": options.steps, "rows": []}

    def keep(rows: list[dict[str, Any]]) -> None:
        document["rows"] += rows
        document["load_after"] = round(os.getloadavg()[0], 2)
        for row in rows:
            speed = f"{row['tokens_per_second']:6} tokens/s"
            print(f"{row['precision']:18} context {row['context']:5} {row['who']:20} {speed}", flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")

    torch.manual_seed(0)
    entrants = [_Contestant(name, *_find(name, options.layers, options.width)) for name in options.models.split(",")]
    for precision in options.precisions.split(","):
        for context in map(int, options.contexts.split(",")):
            tokens = torch.randint(256, (max(1, options.tokens // context), context + 1))
            keep(measure(entrants, tokens, precision == "bfloat16", options.steps))
    for name in filter(None, options.published.split(",")):
        entrant = _Contestant(name, *PUBLISHED[name](options.layers, options.width))
        tokens = torch.randint(256, (1, options.published_context + 1))
        ours = name.split()[-1]
        twin = _Contestant(f"our {ours}, one row", *_ours(ours, options.layers, options.width))
        keep(measure([entrant, twin], tokens, False, 1))
    print("\n" + table(document["rows"]))


if __name__ == "__main__":
    main()
