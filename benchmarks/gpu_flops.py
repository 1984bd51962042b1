"""Arithmetic of the matrix products in GPU kernels, counted where they are made: in Triton's interpreter.

    TRITON_INTERPRET=1 python -m benchmarks.gpu_flops [--ops wkv7,...] [--out JSON]

An operator runs on one head and a few chunks, and every product of (M, K) and (K, N) counts 2·M·N·K, padding and masked
halves included, as a GPU would make them. That grows with B·T·H, so it is scaled to the published shape. Elementwise
arithmetic is not counted: operators without a matrix product have none here.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_ahead import launches
from benchmarks.gpu_cases import CASES, GpuCase
from benchmarks.machine import describe
from statewise import ops
from statewise.files import atomic_write

__all__ = ["count_flops", "main"]

_TOKENS = 128  # whole chunks of every operator
#: Operators of the table with matrix products.
COUNTED = ("ssd", "wkv6", "wkv7")


@contextmanager
def _counting() -> Iterator[Callable[[], int]]:
    """Inside, the result says how many operations products took since it was last asked."""
    from triton.runtime import interpreter

    total = 0
    theirs = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        nonlocal total
        rows, inner = a.data.shape[-2:]
        total += 2 * rows * inner * b.data.shape[-1]
        return theirs(self, a, b, *rest)

    def asked() -> int:
        nonlocal total
        found, total = total, 0
        return found

    interpreter.InterpreterBuilder.create_dot = create_dot
    try:
        yield asked
    finally:
        interpreter.InterpreterBuilder.create_dot = theirs


def _check_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("TRITON_INTERPRET=1 must be set: products are counted in the interpreter")


def count_flops(case: GpuCase) -> tuple[int, int]:
    """Operations of forward, and of forward and backward, at the published shape, bfloat16 inputs.

    Raises:
        ValueError: the process does not interpret kernels, the operator is not one of :data:`COUNTED`, or it launches
            other kernels at the published shape than on one head.
    """
    _check_interpreter()
    if case.op not in COUNTED:
        raise ValueError(f"{case.op} is not one of {', '.join(COUNTED)}")
    small = GpuCase(case.op, 1, _TOKENS, {**case.sizes, "H": 1}, case.shapes, case.wide, case.options)
    one, all_heads = ({x.kernel.__name__ for x in launches(c, torch.bfloat16, full=True)[1]} for c in (small, case))
    if one != all_heads:
        raise ValueError(f"{case.label} launches {sorted(all_heads)}, one head {sorted(one)}: no count of it is true")
    arguments = small.arguments(torch.zeros, torch.bfloat16, "cpu")
    with _counting() as asked:
        with torch.no_grad():
            getattr(ops, case.op)(**arguments, **(case.options or {}), backend="triton")
        forward = asked()
        live = {name: x.requires_grad_() for name, x in arguments.items()}
        y: Tensor = getattr(ops, case.op)(**live, **(case.options or {}), backend="triton")[0]
        torch.autograd.backward(y, torch.zeros_like(y))
        both = asked()
    scale = case.batch * case.time * case.sizes["H"] // _TOKENS
    return forward * scale, both * scale


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_flops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default=",".join(COUNTED), help="comma separated")
    parser.add_argument("--out", type=Path, metavar="JSON")
    chosen = parser.parse_args(arguments)
    _check_interpreter()
    results = []
    for case in CASES:
        if case.op in chosen.ops.split(","):
            try:
                forward, both = count_flops(case)
            except ValueError as error:
                print(error, flush=True)
                continue
            results.append({"case": case.label, "shapes": dict(case.shapes), "forward": forward, "both": both})
            print(f"{case.label}: {forward / 1e9:.0f} and {both / 1e9:.0f} GFLOP", flush=True)
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(chosen.out, json.dumps({"kind": "gpu flops", "machine": describe(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
