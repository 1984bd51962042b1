"""Decoding on a GPU: one token for many sequences of a pool, by one kernel and by plain torch.

    python -m benchmarks.gpu_steps --out benchmarks/results/DATE-steps-gpu.json
    python -m benchmarks.gpu_steps --ahead                     # without a GPU: kernels compiled, registers told
    TRITON_INTERPRET=1 python -m benchmarks.gpu_steps --rehearse   # the whole of it on a CPU, at toy sizes

Legend: B tokens, one a sequence; C channels, M mixtures, W window, U = W-1, H heads, K key rows, V value columns, N
state size, P head width, G groups.

Each step is captured in a CUDA graph and replayed, so that what the host takes does not count, behind a write that
leaves nothing in the L2 cache. Bytes are those of the advanced rows, read and written, of the tokens' tensors and of
the parameters: what has to be moved. Activations are bfloat16 beside float32 parameters.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Clock, CudaClock, RehearsalClock, describe_gpu, measure_rates
from benchmarks.gpu_ahead import compile_launch
from benchmarks.machine import describe
from statewise import ops
from statewise.files import atomic_write
from statewise.ops import gpu
from statewise.ops.checks import trusting_values
from statewise.state import WKV4State

__all__ = ["CASES", "Decoding", "StepCase", "main", "measure"]

BATCHES = (1, 8, 32, 128, 320, 1024)
TOY = {"C": 8, "H": 1, "K": 4, "V": 4, "P": 4, "N": 4}


@dataclass(frozen=True)
class StepCase:
    """A step at a published model's size.

    Attributes:
        op: public name of the operator.
        sizes: by letter.
        tokens: argument → shape of one token of it.
        parameters: argument → shape.
        state: shape of a row of the pool, or of each of WKV-4's three.
        options: further keyword arguments.
    """

    op: str
    sizes: Mapping[str, int]
    tokens: Mapping[str, str]
    parameters: Mapping[str, str]
    state: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.op} " + " ".join(f"{letter}{size}" for letter, size in self.sizes.items())

    def shape(self, letters: str) -> list[int]:
        size = {**self.sizes, "U": self.sizes.get("W", 1) - 1}
        return [size[letter] for letter in letters.split()]


_KEYS = dict.fromkeys(("r", "log_w", "k", "a", "b"), "H K")
_SSD = {"x": "H P", "dt": "H", "B": "G N", "C": "G N", "z": "H P"}

CASES: tuple[StepCase, ...] = (
    StepCase("token_shift", {"C": 2048}, {"x": "C"}, {}, "C"),
    StepCase("token_mix", {"C": 2048, "M": 6}, {"x": "C"}, {"mix": "M C"}, "C"),
    StepCase(
        "causal_conv1d",
        {"C": 4096, "W": 4},
        {"x": "C"},
        {"weight": "C W", "bias": "C"},
        "U C",
        {"activation": "silu"},
    ),
    StepCase("wkv4", {"C": 2048}, {"k": "C", "v": "C"}, {"log_w": "C", "u": "C"}, "C"),
    StepCase(
        "wkv6",
        {"H": 32, "K": 64, "V": 64},
        {"r": "H K", "log_w": "H K", "k": "H K", "v": "H V"},
        {"u": "H K"},
        "H K V",
    ),
    StepCase("wkv7", {"H": 32, "K": 64, "V": 64}, {**_KEYS, "v": "H V"}, {}, "H K V"),
    StepCase(
        "selective_scan",
        {"C": 4096, "N": 16},
        {"x": "C", "dt": "C", "B": "N", "C": "N", "z": "C"},
        {"A": "C N", "D": "C", "dt_bias": "C"},
        "C N",
        {"dt_softplus": True},
    ),
    StepCase(
        "ssd",
        {"H": 64, "P": 64, "G": 1, "N": 128},
        _SSD,
        {"A": "H", "D": "H", "dt_bias": "H"},
        "H P N",
        {"dt_softplus": True},
    ),
)


class Decoding:
    """A step ready to run: B tokens for rows of a pool twice as large, in no order."""

    def __init__(self, case: StepCase, batch: int, storage: torch.dtype, device: torch.device | str) -> None:
        torch.manual_seed(0)
        self.case = case

        def draw(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, device=device).to(dtype)

        self.inputs = {n: draw([batch, *case.shape(s)], torch.bfloat16) for n, s in case.tokens.items()}
        self.inputs |= {name: draw(case.shape(shape), torch.float32) for name, shape in case.parameters.items()}
        for name in self.inputs.keys() & {"log_w", "A"}:
            self.inputs[name] = -self.inputs[name].abs()
        row = [2 * batch, *case.shape(case.state)]
        first = draw(row, storage)
        whole = case.op == "wkv4"
        self.state = WKV4State(first, draw(row, storage).abs(), draw(row, torch.float32)) if whole else first
        self.index = torch.randperm(2 * batch, device=device)[:batch]

    def in_place(self, backend: str) -> object:
        step = getattr(ops, f"{self.case.op}_step_")
        return step(**self.inputs, state=self.state, index=self.index, **self.case.options, backend=backend)

    def bytes(self) -> int:
        """What has to be moved."""
        leaves = [self.state] if isinstance(self.state, Tensor) else list(self.state)
        y = self.inputs["v" if "v" in self.inputs else "x"].nbytes * self.case.sizes.get("M", 1)
        read = sum(x.nbytes for x in [*self.inputs.values(), self.index]) + y
        return read + sum(leaf.nbytes for leaf in leaves)  # half of the rows, twice


def captured(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """``call`` as a CUDA graph; off a GPU as it is."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(
    case: StepCase,
    batch: int,
    storage: torch.dtype,
    device: torch.device,
    clock: Clock,
    rate: float,
    rounds: int = 30,
) -> dict[str, Any]:
    """Medians of both forms, interleaved; ``rate`` is bytes a second that the machine reaches."""
    with torch.no_grad(), trusting_values():
        ready = Decoding(case, batch, storage, device)
        calls = {name: captured(lambda name=name: ready.in_place(name), device) for name in ("triton", "torch")}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(clock.milliseconds(call))
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "op": case.op,
        "case": case.label,
        "B": batch,
        "storage": str(storage).removeprefix("torch."),
        "bytes": ready.bytes(),
        **{f"{name}_us": round(1e3 * median, 2) for name, median in medians.items()},
        "of_bandwidth": round(ready.bytes() / rate / (medians["triton"] / 1e3), 3),
    }


def ahead(cases: Sequence[StepCase], capabilities: Sequence[int]) -> int:
    """Compile every kernel, in place and out of place, and tell what it takes; how many spill registers."""
    spilled = 0
    for case in cases:
        for storage in (torch.float32, torch.bfloat16):
            ready = Decoding(case, 2, storage, "cpu")
            with gpu.capture() as noted, torch.no_grad():
                ready.in_place("triton")
            for capability in capabilities:
                used = compile_launch(noted[0], capability)
                spilled += used["spilled_bytes"] > 0
                print(f"{case.label:36} state {str(storage)[6:]:8} sm_{capability} {used}", flush=True)
    return spilled


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if a kernel spills, 2 if there is nothing to run on."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_steps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", default="", help="only these, comma separated")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--capabilities", default="80,90,100", help="what --ahead compiles for")
    parser.add_argument("--ahead", action="store_true", help="compile, and measure nothing")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter, at toy sizes")
    parser.add_argument("--out", type=Path, metavar="JSON")
    chosen = parser.parse_args(arguments)
    cases = [case for case in CASES if not chosen.ops or case.op in chosen.ops.split(",")]
    if chosen.ahead:
        return int(ahead(cases, [int(part) for part in chosen.capabilities.split(",")]) > 0)
    device = torch.device("cpu" if chosen.rehearse else "cuda")
    if reason := gpu.serves(device) or ("" if chosen.rehearse or torch.cuda.is_available() else "there is no GPU"):
        print(f"benchmarks.gpu_steps: {reason}")
        return 2
    clock: Clock = RehearsalClock() if chosen.rehearse else CudaClock(device)
    rate = measure_rates(clock, device, tiny=chosen.rehearse)["bytes"]
    rows = []
    for case in cases:
        for storage in (torch.float32, torch.bfloat16):
            for batch in map(int, chosen.batches.split(",")):
                if chosen.rehearse:
                    sizes = {letter: min(size, TOY.get(letter, size)) for letter, size in case.sizes.items()}
                    toy = dataclasses.replace(case, sizes=sizes)
                    rows.append(measure(toy, min(batch, 2), storage, device, clock, rate, rounds=2))
                else:
                    rows.append(measure(case, batch, storage, device, clock, rate))
                row = rows[-1]
                print(
                    f"{row['case']:32} B{row['B']:<5} {row['storage']:9} {row['triton_us']:9.1f} us"
                    f"  torch {row['torch_us']:9.1f} us  {row['of_bandwidth']:.2f} of a copy's bandwidth",
                    flush=True,
                )
    if chosen.out is not None:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        told = {"kind": "gpu steps", "machine": describe(), "gpu": describe_gpu(device), "rehearsal": chosen.rehearse}
        atomic_write(chosen.out, json.dumps({**told, "bytes_a_second": rate, "results": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    import sys

    if "--ahead" in sys.argv:
        os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
