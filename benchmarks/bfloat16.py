"""Our compiled operators with bfloat16 activations beside float32, in one run.

    python -m benchmarks.bfloat16 --out benchmarks/results/DATE-native-cpu-bfloat16.json

Rounds are interleaved, medians told. Half the bytes help where an operator waits for memory, so every length is told
also as nanoseconds a token beyond a call of one token, beside a length whose tensors stay in the caches: where float32
is as fast from memory as it is there, it is bound by arithmetic, and no dtype can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe
from benchmarks.ops import SHAPES, draw, measure_bandwidth, ours
from statewise.files import atomic_write

DTYPES = (torch.float32, torch.bfloat16)
IN_CACHE = 64  # tokens a row
LEAST = 0.03  # seconds that a round of one dtype lasts


def measure(op: str, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """One row a length, a single token first: medians in milliseconds, and what bfloat16 gains."""
    rows: list[dict[str, Any]] = []
    for length in lengths:
        row: dict[str, Any] = {"op": op, "shape": SHAPES[op], "T": length}
        runs = {(kind, dtype): _run(op, length, dtype, kind) for dtype in DTYPES for kind in ("forward", "both")}
        times: dict[tuple[str, torch.dtype], list[float]] = {key: [] for key in runs}
        for _ in range(repeats):
            for key, run in runs.items():
                times[key].append(_seconds(run))
        for (kind, dtype), values in times.items():
            name = f"{kind}_{str(dtype).removeprefix('torch.')}"
            row[f"{name}_ms"] = round(1e3 * statistics.median(values), 4)
            row[f"{name}_ms_range"] = [round(1e3 * bound, 4) for bound in (min(values), max(values))]
            if rows:
                beyond = row[f"{name}_ms"] - rows[0][f"{name}_ms"]
                row[f"{name}_ns_a_token"] = round(1e6 * beyond / (length - 1), 1)
        for kind in ("forward", "both"):
            row[f"{kind}_gain"] = round(row[f"{kind}_float32_ms"] / row[f"{kind}_bfloat16_ms"], 3)
        rows.append(row)
        print(
            f"{op:15} T={length:<5} gains {row['forward_gain']:5.2f} forward {row['both_gain']:5.2f} both", flush=True
        )
    return rows


def _run(op: str, length: int, dtype: torch.dtype, kind: str) -> Callable[[], object]:
    inputs, run = draw(op, length, dtype), ours(op, "native")
    leaves = list(inputs.values())
    with torch.no_grad():
        cotangent = torch.randn_like(run(inputs))

    def forward() -> object:
        with torch.no_grad():
            return run(inputs)

    def both() -> object:
        return torch.autograd.grad(run(inputs), leaves, cotangent)

    return forward if kind == "forward" else both


def _seconds(run: Callable[[], object]) -> float:
    """The median of calls that last LEAST together, after as many that are not counted: the one before filled the
    caches with something else."""
    times: list[float] = []
    for _ in range(2):
        times = []
        until = time.perf_counter() + LEAST
        while not times or time.perf_counter() < until:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.bfloat16", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default=",".join(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--lengths", default="1024,16384", help=f"values of T beside 1 and {IN_CACHE}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where results go, after every operator")
    options = parser.parse_args(arguments)
    names = options.ops.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        parser.error(f"--ops: {', '.join(unknown)}; {', '.join(SHAPES)} are accepted")
    try:
        lengths = sorted({1, IN_CACHE, *map(int, options.lengths.split(","))})
    except ValueError:
        lengths = [0]
    if lengths[0] < 1 or options.threads < 1 or options.repeats < 1:
        parser.error("--lengths, --threads and --repeats take numbers of 1 or more")
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {
        "kind": "bfloat16",
        "machine": describe(),
        "repeats": options.repeats,
        "in_cache": IN_CACHE,
        "copy_bytes_per_second": round(measure_bandwidth()),
        "rows": [],
    }
    for op in names:
        document["rows"] += measure(op, lengths, options.repeats)
        document |= {"complete": op == names[-1], "load_after": round(os.getloadavg()[0], 2)}
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
