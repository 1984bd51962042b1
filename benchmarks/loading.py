"""Checkpoints at real sizes: seconds and memory to load them, and agreement, beside the package they belong to.

    python -m benchmarks.loading --folder SCRATCH --out benchmarks/results/DATE-loading-cpu.json

Files of random weights are made from a seed, in the formats and dtypes that their projects publish. Each contestant
loads in a process of its own, several times, medians are told, after a tiny checkpoint of the same kind was loaded and
run there (imports, first calls); the file lies in the page cache. Then it reads a prompt, three times, and the logits
of its last token are compared. Memory is the peak of the resident set above what it was before, as a multiple of the
file; pages of a file that is mapped count once they were touched. ``SCRATCH`` needs room for 6 GB; files are made when
first needed and kept.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.machine import describe
from statewise.files import atomic_write
from statewise.testing.memory import resident_peak

PROMPT = [(7919 * index) % 40000 for index in range(1, 33)]


class Case(NamedTuple):
    """One checkpoint: our name and sizes, the format it is published in, its dtype there, whose package reads it."""

    architecture: str
    fields: dict[str, Any]
    format: str
    dtype: torch.dtype
    peer: str


_WORLD = {"vocab_size": 65536}
CASES = {
    "rwkv7-0.1b": Case("rwkv7", {**_WORLD, "num_layers": 12, "width": 768}, "rwkv", torch.bfloat16, "rwkv"),
    "rwkv7-0.4b": Case("rwkv7", {**_WORLD, "num_layers": 24, "width": 1024}, "rwkv", torch.bfloat16, "rwkv"),
    "rwkv7-1.5b": Case("rwkv7", {**_WORLD, "num_layers": 24, "width": 2048}, "rwkv", torch.bfloat16, "rwkv"),
    "rwkv4-169m": Case("rwkv4", {"vocab_size": 50277, "num_layers": 12, "width": 768}, "rwkv", torch.bfloat16, "rwkv"),
    "rwkv4-169m-hf": Case(
        "rwkv4", {"vocab_size": 50277, "num_layers": 12, "width": 768}, "hf", torch.float32, "transformers"
    ),
    "mamba-130m": Case(
        "mamba", {"vocab_size": 50280, "num_layers": 24, "width": 768}, "hf", torch.float32, "transformers"
    ),
    "mamba2-130m": Case(
        "mamba2", {"vocab_size": 50288, "num_layers": 24, "width": 768}, "hf", torch.float32, "transformers"
    ),
}


def make(case: Case, path: Path) -> None:
    """Write a checkpoint of random weights that lets signals through, from seed 0."""
    import statewise
    from statewise.models import checkpoint_of
    from statewise.weights import write

    with torch.device("meta"):
        model = statewise.create(case.architecture, **case.fields)
    found = checkpoint_of(model)
    generator = torch.Generator().manual_seed(0)
    made: dict[int, Tensor] = {}  # tied tensors stay tied
    tensors = {}
    for name, empty in model.state_dict(keep_vars=True).items():
        if id(empty) not in made:
            made[id(empty)] = _random(name, empty.shape, generator).to(case.dtype)
        tensors[name] = made[id(empty)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, found._replace(tensors=tensors), case.format)


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    values = torch.randn(shape, generator=generator)
    if "A_log" in name:
        return values.abs()
    if len(shape) > 1 and min(shape) > 1:
        return values * shape[-1] ** -0.5
    is_scale = name.endswith("weight") and ("norm" in name or "ln" in name)
    return 0.1 * values + (1.0 if is_scale else 0.0)


def size(path: Path) -> int:
    """Bytes of the tensors' files."""
    return sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size


# -- one contestant, in a process of its own ---------------------------------------------------------------------------


def _ours(path: Path, dtype: torch.dtype, mapped: bool = False) -> Callable[[], Callable[[], Tensor]]:
    import statewise

    def load() -> Callable[[], Tensor]:
        model: Any = statewise.load(path, dtype=dtype, mapped=mapped)
        return lambda: model(torch.tensor([PROMPT]))[0][0, -1]

    return load


def _rwkv(path: Path, dtype: torch.dtype) -> Callable[[], Callable[[], Tensor]]:
    from rwkv.model import RWKV

    strategy = {torch.float32: "cpu fp32", torch.bfloat16: "cpu bf16"}[dtype]

    def load() -> Callable[[], Tensor]:
        model = RWKV(model=str(path.with_suffix("")), strategy=strategy)
        return lambda: model.forward(list(PROMPT), None)[0]

    return load


def _transformers(path: Path, dtype: torch.dtype) -> Callable[[], Callable[[], Tensor]]:
    from transformers import AutoModelForCausalLM

    def load() -> Callable[[], Tensor]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        return lambda: model(torch.tensor([PROMPT])).logits[0, -1]

    return load


_MAPPED = "statewise, mapped"
_READERS = {"statewise": _ours, _MAPPED: partial(_ours, mapped=True), "rwkv": _rwkv, "transformers": _transformers}


@torch.no_grad()
def _contest(who: str, path: Path, tiny: Path, dtype: torch.dtype, repeats: int, logits: Path) -> dict[str, Any]:
    _READERS[who](tiny, dtype)()()
    load = _READERS[who](path, dtype)
    seconds, peaks = [], []
    run: Callable[[], Tensor] | None = None
    for _ in range(repeats):
        run = None
        before = resident_peak(reset=True)
        start = time.perf_counter()
        run = load()
        seconds.append(time.perf_counter() - start)
        after = resident_peak(reset=False)
        peaks.append(None if before is None or after is None else after - before)
    assert run is not None
    prompts = []
    for _ in range(3):
        start = time.perf_counter()
        told = run()
        prompts.append(time.perf_counter() - start)
    torch.save(told.float(), logits)
    return {
        "seconds": round(statistics.median(seconds), 3),
        "range": [round(min(seconds), 3), round(max(seconds), 3)],
        "peak_bytes": None if None in peaks else statistics.median(peaks),
        "prompt_seconds": round(statistics.median(prompts), 3),
    }


def _in_a_process(
    who: str, path: Path, tiny: Path, dtype: str, repeats: int, logits: Path, threads: int
) -> dict[str, Any]:
    told = (who, str(path), str(tiny), dtype, str(repeats), str(logits))
    command = [sys.executable, "-m", "benchmarks.loading", "--child", *told]
    chosen = {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": str(int("rwkv7" in path.name))}
    done = subprocess.run(
        command,
        env={**os.environ, **chosen, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{who} on {path.name}: {done.stderr[-1500:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds, memory, and the largest difference of logits."""
    lines = ["| file | read as | who | seconds | peak / file | prompt, s | logits differ by |", "|---" * 7 + "|"]
    for row in rows:
        memory = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / row['file_bytes']:.2f}"
        gap = "" if row["gap"] is None else f"{row['gap']:.1e} of {row['scale']:.1f}"
        file = f"{row['case']}, {row['file_dtype']}, {row['file_bytes'] / 1e6:.0f} MB"
        cells = (file, row["dtype"], row["who"], f"{row['seconds']:.2f}", memory, f"{row['prompt_seconds']:.2f}", gap)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.loading", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where the files of random weights lie or will lie")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--child", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        who, large, small, dtype, repeats, told = options.child
        print(json.dumps(_contest(who, Path(large), Path(small), getattr(torch, dtype), int(repeats), Path(told))))
        return
    if options.folder is None:
        parser.error("--folder is needed")
    torch.set_num_threads(options.threads)
    document: dict[str, Any] = {"kind": "loading", "machine": describe(), "repeats": options.repeats, "rows": []}
    for name in options.cases.split(","):
        case = CASES[name]
        ending = ".pth" if case.format == "rwkv" else ""
        path, tiny = options.folder / (name + ending), options.folder / (f"{name}-tiny{ending}")
        for place, made in ((path, case), (tiny, case._replace(fields={**case.fields, "num_layers": 2, "width": 128}))):
            if not place.exists():
                print(f"making {place}", flush=True)
                make(made, place)
        kept = str(case.dtype).removeprefix("torch.")
        for dtype in dict.fromkeys((kept, "float32")):
            logits = {}
            for who in (case.peer, "statewise", *([_MAPPED] if dtype == kept else [])):
                place = options.folder / f"{name}.{who}.logits"
                row = _in_a_process(who, path, tiny, dtype, options.repeats, place, options.threads)
                logits[who] = torch.load(place)
                place.unlink()
                same = None if who == case.peer else logits[who][: len(logits[case.peer])]
                row |= {"case": name, "who": who, "dtype": dtype, "file_dtype": kept, "file_bytes": size(path)}
                row["gap"] = None if same is None else float((same - logits[case.peer]).abs().max())
                row["scale"] = float(logits[who].abs().max())
                document["rows"].append(row)
                print(table([row]).splitlines()[-1], flush=True)
        if options.out is not None:
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")
    print("\n" + table(document["rows"]))


if __name__ == "__main__":
    main()
