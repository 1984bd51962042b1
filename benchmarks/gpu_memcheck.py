"""Every GPU kernel once, on few tokens, to be run under compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m benchmarks.gpu_memcheck

Legend: B rows, T time.

Dense, padded and packed rows, of lengths that no chunk divides, forward and backward, at the sizes of the laws (small
and odd) and of the benchmarks; every configuration that tuning chooses between. Nothing is compared: tests do that.
Without torch's caching every tensor is an allocation of its own, and an access past its end is past an allocation.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import draw
from benchmarks.gpu_cases import CASES as BENCHMARKED
from statewise import ops
from statewise.ops import gpu
from statewise.testing.cases import CASES

__all__ = ["every_choice", "main", "runs"]

_TIMES = (1, 37)
_SMALL = {"H": 3, "C": 96}


def every_choice(key: str, device: torch.device, choices: Sequence[Any], run: Callable[[Any], None]) -> Any:
    """In place of :func:`statewise.ops.gpu.tune`: runs each configuration, and times none."""
    for choice in choices:
        run(choice)
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


def runs(device: str, dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A label and what to run, one a case, dtype and kind of rows."""
    with gpu.capture():
        served = {op for op, names in ops.backends().items() if names["triton"].serves}
    for dtype in dtypes:
        for case in CASES:
            if case.op not in served:
                continue
            for time in _TIMES:
                for kind, where in _where(case.op, 2, time, device):
                    rows = 1 if kind == "packed" else 2

                    def law(c: Any = case, t: int = time, r: int = rows, w: Any = where, d: Any = dtype) -> None:
                        on_device = dataclasses.replace(c, device=device)
                        inputs = {k: x.requires_grad_() for k, x in on_device.inputs(r, t, d).items()}
                        state = on_device.begin(w["cu_seqlens"].shape[0] - 1 if "cu_seqlens" in w else r, d)
                        _backward(on_device.call(inputs, state, backend="triton", **w), inputs)

                    yield f"{case.id} {dtype} T={time} {kind}", law
        for row in BENCHMARKED:
            if row.op not in served:
                continue
            sizes = {letter: min(size, _SMALL.get(letter, size)) for letter, size in row.sizes.items()}
            for kind, where in _where(row.op, 2, 100, device):
                small = dataclasses.replace(row, batch=1 if kind == "packed" else 2, time=100, sizes=sizes)

                def shape(s: Any = small, w: Any = where, d: Any = dtype) -> None:
                    inputs = {k: x.requires_grad_() for k, x in draw(s, d, device).items()}
                    _backward(getattr(ops, s.op)(**inputs, **(s.options or {}), backend="triton", **w), inputs)

                yield f"{small.label} {dtype} {kind}", shape


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_memcheck", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--only", default="", help="those whose label holds this text")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter")
    options = parser.parse_args(arguments)
    if options.rehearse and not gpu.interpreting():
        parser.error("--rehearse needs Triton's interpreter: TRITON_INTERPRET=1 in the environment")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse goes through the motions without one")
    device = "cpu" if options.rehearse else "cuda"
    before, gpu.tune = gpu.tune, every_choice
    count = 0
    try:
        for label, run in runs(device, [getattr(torch, name) for name in options.dtypes.split(",")]):
            if options.only in label:
                print(label, flush=True)
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                count += 1
    finally:
        gpu.tune = before
    print(f"{count} runs")
    return int(count == 0)


if __name__ == "__main__":
    raise SystemExit(main())
