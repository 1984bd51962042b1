"""Every GPU kernel once, on few tokens, to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_memcheck

Legend: B rows, T time.

Dense, padded and packed rows, of lengths that no chunk divides, forward and backward, at the sizes of the laws (small
and odd) and, dense ones in every configuration that tuning chooses between, of the benchmarks. Nothing is compared:
tests do that. ``--jobs`` runs it in several processes, without the tool, so that all is compiled before.
Without torch's caching every tensor is an allocation of its own, and an access past its end is past an allocation.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import draw, particulars
from benchmarks.gpu_cases import CASES as BENCHMARKED
from statewise import ops
from statewise.ops import gpu
from statewise.testing.cases import CASES

__all__ = ["every_choice", "main", "runs"]

_TIMES = (1, 37)
# Tokens of the one row of a case of few heads: enough to be cut into segments.
_SEGMENTS = 600
_SMALL = {"H": 3, "C": 96}


def every_choice(key: str, device: torch.device, choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
    """In place of :func:`statewise.ops.gpu.tune`: runs each configuration, and times none."""
    for choice in choices:
        run(choice)
    return choices[0]


def first_choice(key: str, device: torch.device, choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
    """In place of it where one configuration will do."""
    return choices[0]


def _backward(result: Any, inputs: dict[str, Tensor]) -> None:
    leaves = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    torch.autograd.grad([x.sum() for x in leaves], list(inputs.values()), allow_unused=True)


def _where(op: str, rows: int, time: int, device: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    yield "dense", {}
    if time > 1:
        yield "padded", {"lengths": torch.tensor([time - 5, 0, time][:rows], device=device)}
        if op != "bi_wkv":
            yield "packed", {"cu_seqlens": torch.tensor([0, 19, 19, time], device=device)}


class Run(NamedTuple):
    """A label, what to run, and whether in every configuration."""

    label: str
    call: Callable[[], None]
    every: bool


def runs(device: str) -> Iterator[Run]:
    """One a case, dtype and kind of rows."""
    with gpu.capture():
        served = {op for op, names in ops.backends().items() if names["triton"].serves}
    for case in CASES:
        if case.op not in served:
            continue
        for time in _TIMES:
            for kind, where in _where(case.op, 2, time, device):
                rows = 1 if kind == "packed" else 2

                def law(c: Any = case, t: int = time, r: int = rows, w: Any = where) -> None:
                    on_device = dataclasses.replace(c, device=device)
                    inputs = {k: x.requires_grad_() for k, x in on_device.inputs(r, t, torch.bfloat16).items()}
                    state = on_device.begin(w["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in w else r, torch.bfloat16)
                    _backward(on_device.call(inputs, state, backend="triton", **w), inputs)

                yield Run(f"{case.id} T={time} {kind}", law, False)
    for row in BENCHMARKED:
        if row.op not in served:
            continue
        sizes = {letter: min(size, _SMALL.get(letter, size)) for letter, size in row.sizes.items()}
        rows, time = (1, _SEGMENTS) if row.batch == 1 else (2, 100)
        for dtype in (torch.bfloat16, torch.float32):
            for kind, where in _where(row.op, rows, time, device):
                if kind != "dense" and dtype == torch.float32:
                    continue  # differs from bfloat16 in how products are made, not in where things lie
                small = dataclasses.replace(row, batch=1 if kind == "packed" else rows, time=time, sizes=sizes)

                def shape(s: Any = small, w: Any = where, d: Any = dtype) -> None:
                    inputs = {k: x.requires_grad_() for k, x in draw(s, d, device).items()}
                    _backward(getattr(ops, s.op)(**inputs, **(s.options or {}), backend="triton", **w), inputs)

                yield Run(f"{row.label}{particulars(row)}, {dtype} {kind}", shape, kind == "dense")


def _in_parts(jobs: int, arguments: Sequence[str]) -> int:
    """Every process takes each ``jobs``-th run; the worst exit status."""
    command = [sys.executable, "-m", "benchmarks.gpu_memcheck", *arguments]
    parts = [subprocess.Popen([*command, "--part", f"{part}/{jobs}"]) for part in range(jobs)]
    return max(abs(part.wait()) for part in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_memcheck", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs")
    parser.add_argument("--part", default="0/1", metavar="K/N", help="every N-th run, from the K-th")
    parser.add_argument("--only", default="", help="those whose label holds this text")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.rehearse and not gpu.interpreting():
        parser.error("--rehearse needs Triton's interpreter: TRITON_INTERPRET=1 in the environment")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse goes through the motions without one")
    if options.jobs > 1:
        return _in_parts(options.jobs, ["--only", options.only, *(["--rehearse"] if options.rehearse else [])])
    device = "cpu" if options.rehearse else "cuda"
    part, parts = map(int, options.part.split("/"))
    chosen = [run for run in runs(device) if options.only in run.label]
    tune = gpu.tune
    try:
        for run in chosen[part::parts]:
            print(run.label, flush=True)
            gpu.tune = every_choice if run.every else first_choice
            run.call()
            if device == "cuda":
                torch.cuda.synchronize()
    finally:
        gpu.tune = tune
    print(f"{len(chosen[part::parts])} of {len(chosen)} runs")
    return int(not chosen)


if __name__ == "__main__":
    raise SystemExit(main())
