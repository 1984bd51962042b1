"""Operators on a GPU: ours beside published kernels and torch's attention, over length.

    python -m benchmarks.gpu --out benchmarks/results/DATE-ops-gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu --rehearse          # the whole of it on a CPU, at toy sizes

Legend: B batch, T time.

Every row of ``gpu_cases.py`` is timed at its own shape and at every ``--lengths``, with the batch scaled so that B·T
stays about what it was. Times are those of CUDA events around one call, the medians of rounds interleaved between
contestants; before each call a buffer several times the size of the L2 cache is written. Forward and backward are timed
as one. What a peer wants laid out otherwise is laid out before. Errors are those of outputs and of every gradient
against the same function of the same (rounded) inputs in float64, on few tokens, as ‖found - true‖ / ‖true‖, for random
keys and for keys that are alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.gpu_ahead import count_bytes, launches
from benchmarks.gpu_cases import CASES, GpuCase
from benchmarks.gpu_peers import GpuPeer, attention, find_gpu_peers
from benchmarks.machine import describe
from benchmarks.plot import draw_gpu, gpu_table
from statewise import ops
from statewise.files import atomic_write
from statewise.ops import gpu
from statewise.testing.peers import join, ours

__all__ = ["CudaClock", "draw", "main", "measure", "recurrence_flops", "scaled"]

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
#: What differs from float64 by more than this, relative to its norm, is not timed: it computes something else.
SAME = 0.05
#: Tokens that errors are measured on.
JUDGED = 512
#: The chunked form in plain torch is there for its shape, which shorter lengths show.
LONGEST_TORCH = 4096
#: Cycles of the device, about a millisecond.
_HEAD_START = 2_000_000
#: Sizes of a rehearsal.
TOY = {"H": 2, "K": 16, "V": 16, "N": 16, "P": 16, "C": 32, "S": 4, "R": 2}


class Clock(Protocol):
    """Times calls; :class:`CudaClock` is the real one."""

    def milliseconds(self, call: Callable[[], object]) -> float: ...
    def peak(self, call: Callable[[], object]) -> int | None: ...


class CudaClock:
    """Events around a call, behind a write that leaves nothing of ours in the L2 cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
        # Two in turn, so that none of what is written is in the cache already.
        self.buffers = [torch.empty(max(size, 1 << 28), dtype=torch.int8, device=device) for _ in range(2)]

    def milliseconds(self, call: Callable[[], object]) -> float:
        self.buffers.reverse()
        self.buffers[0].zero_()
        torch.cuda._sleep(_HEAD_START)  # the host gets ahead: what is timed is the device, not the launching
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        kept = call()  # freed after the clock has stopped
        after.record()
        after.synchronize()
        del kept
        return before.elapsed_time(after)

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes above what is held before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


class RehearsalClock:
    """Wall time on a CPU: figures without a meaning."""

    def milliseconds(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def peak(self, call: Callable[[], object]) -> int | None:
        return None


def scaled(case: GpuCase, time: int) -> GpuCase:
    """``case`` at another length, with about as many tokens in all."""
    return dataclasses.replace(case, batch=max(1, case.batch * case.time // time), time=time)


def toy(case: GpuCase) -> GpuCase:
    """``case`` at sizes that an interpreter can bear."""
    sizes = {letter: min(size, TOY.get(letter, size)) for letter, size in case.sizes.items()}
    return dataclasses.replace(case, batch=1, time=24, sizes=sizes)


def particulars(case: GpuCase) -> str:
    """What tells ``case`` from the others of its label, such as a decay's shape; empty if there are none."""
    twins = [other for other in CASES if other.label == case.label]
    told: dict[str, list[str]] = {}  # name → what it is in each of them
    for twin in twins:
        for name in dict.fromkeys(name for other in twins for name in (*other.shapes, *(other.options or {}))):
            value = twin.shapes.get(name, (twin.options or {}).get(name, "none"))
            told.setdefault(name, []).append(str(value).replace(" ", ", "))
    place = twins.index(case) if case in twins else 0
    return "".join(f", {name} ({values[place]})" for name, values in told.items() if len(set(values)) > 1)


def draw(
    case: GpuCase, dtype: torch.dtype, device: torch.device | str, *, alike: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments in the ranges that a trained model has.

    Args:
        alike: keys (and what RWKV-7 looks up) of all tokens are almost one: what errors add up on.
    """
    torch.manual_seed(seed)
    drawn = case.arguments(torch.randn, torch.float32, device)
    wanted = {name: x.dtype for name, x in case.arguments(torch.empty, dtype, "meta").items()}
    if alike:
        key = "B" if case.op in ("ssd", "mamba3", "selective_scan") else "k"
        for name in (key, "a"):
            if name in drawn and drawn[name].dim() >= 3:
                drawn[name] = drawn[name][:1, :1] + 0.2 * drawn[name]
    if case.op == "wkv7":
        direction = torch.nn.functional.normalize(drawn["a"], dim=-1)
        rate = torch.sigmoid(drawn["b"] + (2.0 if alike else 0.0))
        drawn |= {"a": -direction, "b": direction * rate}
    softplus = bool((case.options or {}).get("dt_softplus"))
    found = {name: _range(case.op, name, x, softplus) for name, x in drawn.items()}
    return {name: x.to(wanted[name]) for name, x in found.items()}


def _range(op: str, name: str, x: Tensor, softplus: bool) -> Tensor:
    """A standard normal ``x``, moved to where the argument ``name`` of ``op`` lies."""
    if name == "log_w":
        # RWKV-7's bound, and a little less, so that rounding to bfloat16 does not cross it.
        decays = {
            "wkv7": lambda: -0.604 * torch.sigmoid(x),
            "wkv6": lambda: -torch.exp(x - 2),
            "bi_wkv": lambda: x / 64,
        }
        return decays.get(op, lambda: -torch.exp(x - 1))()
    if name == "dt":
        return x - 3 if softplus else torch.nn.functional.softplus(x - 3)
    if name == "log_decay":
        return -torch.nn.functional.softplus(x - 2)
    if name == "A":
        return -(1 + 15 * torch.sigmoid(x))
    if name in ("k", "C") and op in ("wkv6", "wkv7", "ssd", "mamba3"):
        return x * x.shape[-1] ** -0.5
    if name in ("D", "C_bias", "B_bias"):
        return 1 + x / 10
    return torch.sigmoid(x) if name == "mix" else x / 2 if name in ("weight", "dt_bias") else x


def recurrence_flops(case: GpuCase) -> tuple[int, int]:
    """Multiplications and additions of the plain recurrence, forward and with backward.

    That is what has to be computed, not what a chunked form does. A multiply-add is two; backward counts as two
    forwards.
    """
    size = {**case.sizes, "B": case.batch, "T": case.time}
    tokens, heads = case.batch * case.time, size.get("H", 1)
    matrix = size.get("K", size.get("N", 1)) * size.get("V", size.get("P", 1))
    each = {
        "wkv7": 4 * matrix * heads,  # what a finds, what b puts back, k v, what r reads
        "wkv6": 2 * matrix * heads,
        "ssd": 2 * matrix * heads,
        "mamba3": 3 * matrix * heads * size.get("R", 1),  # a token enters twice
        "selective_scan": 3 * size.get("C", 1) * size.get("N", 1),
        "causal_conv1d": size.get("C", 1) * size.get("W", 1),
    }.get(case.op, 4 * size.get("C", 1))
    forward = 2 * tokens * each
    return forward, 3 * forward


def least_bytes(case: GpuCase, dtype: torch.dtype) -> tuple[int, int]:
    """What the case says has to be moved at least, forward and with backward."""
    first = next(iter(case.arguments(torch.empty, dtype, "meta").values()))
    return case.floor[0] * first.nbytes, case.floor[1] * first.nbytes


def moved_bytes(case: GpuCase, dtype: torch.dtype) -> tuple[int, int] | None:
    """What our launches move; ``None`` where the operator has none."""
    if not _has_kernels(case):
        return None
    forward, both = launches(case, dtype, full=True)
    return count_bytes(forward), count_bytes(both)


def _has_kernels(case: GpuCase) -> bool:
    """Whether this release has GPU kernels for the operator, whatever is here to run them."""
    with gpu.capture():
        return ops.backends()[case.op]["triton"].serves


def our_peers(case: GpuCase) -> list[GpuPeer]:
    """Our own forms as contestants: kernels first, then plain torch."""
    function, options = getattr(ops, case.op), dict(case.options or {})

    def contestant(backend: str) -> GpuPeer:
        def run(inputs: Mapping[str, Tensor]) -> Any:
            result = function(**inputs, **options, backend=backend)
            return result if isinstance(result, Tensor) else result[0]  # bi_wkv has no state

        return GpuPeer(f"statewise {backend}", "this commit", dict, run, join)

    return [contestant(name) for name in (("triton", "torch") if _has_kernels(case) else ("torch",))]


def judge(case: GpuCase, peer: GpuPeer, truth: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, float]:
    """``‖found - true‖ / ‖true‖`` of y and of every gradient."""
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = peer.finish(peer.run(peer.prepare(given)))
    grads = torch.autograd.grad(y, list(given.values()), truth["cotangent"].to(y.dtype), allow_unused=True)
    found = {"y": y, **{f"d_{name}": grad for name, grad in zip(given, grads, strict=True)}}
    return {name: _ratio(x, truth[name]) for name, x in found.items() if x is not None}


def _ratio(found: Tensor, true: Tensor) -> float:
    gap = torch.linalg.vector_norm(found.detach().double() - true)
    scale = torch.linalg.vector_norm(true)
    return float(gap / scale) if scale > 0 else float(gap)


def truth_of(case: GpuCase, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """y, its cotangent and all gradients in float64, by our chunked form, which tests hold to the plain loop."""
    wide = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    y = ours(case.op, "torch", **dict(case.options or {}))(wide)
    cotangent = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(wide.values()), cotangent, allow_unused=True)
    known = {f"d_{name}": grad for name, grad in zip(wide, grads, strict=True) if grad is not None}
    return {"y": y.detach(), "cotangent": cotangent, **known}


def errors_of(
    case: GpuCase, contestants: Sequence[GpuPeer], dtype: torch.dtype, device: torch.device, tokens: int
) -> dict[str, dict[str, Any]]:
    """Contestant → ``random`` and ``alike`` → errors, or ``failed``, the reason."""
    small = dataclasses.replace(case, batch=1, time=tokens)
    found: dict[str, dict[str, Any]] = {who.name: {} for who in contestants}
    for kind in ("random", "alike"):
        inputs = draw(small, dtype, device, alike=kind == "alike", seed=1)
        truth = truth_of(small, inputs)
        for who in contestants:
            if who.name != "torch SDPA" and "failed" not in found[who.name]:
                try:
                    found[who.name][kind] = judge(small, who, truth, inputs)
                except Exception as error:
                    found[who.name]["failed"] = _told(error)
    return found


def _told(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160] if first else ''}".rstrip(": ")


def measure(
    case: GpuCase,
    contestants: Sequence[GpuPeer],
    dtype: torch.dtype,
    device: torch.device,
    clock: Clock,
    rates: Mapping[str, float],
    rounds: tuple[int, int] = (5, 50),
) -> list[dict[str, Any]]:
    """Time every contestant at one shape.

    Args:
        contestants: those that compute the right thing.
        clock: how to time.
        rates: ``bytes`` and ``flops`` a second that the machine reaches; fractions of them are told.
        rounds: fewest and most.

    Returns:
        One row a contestant, with its medians, or ``skipped``, the reason.
    """
    rows: list[dict[str, Any]] = []
    ready: list[tuple[dict[str, Any], dict[str, Callable[[], object]], int]] = []
    inputs = draw(case, dtype, device)
    moved = moved_bytes(case, dtype)
    for who in contestants:
        row: dict[str, Any] = {"op": case.op, "B": case.batch, "T": case.time, "who": who.name, "version": who.version}
        rows.append(row)
        if who.name == "statewise torch" and case.time > LONGEST_TORCH:
            row["skipped"] = f"plain torch is timed up to T = {LONGEST_TORCH}"
            continue
        try:
            calls = _calls(who, inputs)
            row["peak_bytes"] = clock.peak(calls["both"])  # compiled and tuned before anything is timed
            calls["forward"]()
            first = max(clock.milliseconds(calls["both"]), 1e-3)
        except Exception as error:
            if who.name == "statewise triton":  # ours: a fault, not a limit
                raise
            row["skipped"] = _told(error)
            continue
        ready.append((row, calls, min(rounds[1], max(rounds[0], int(400 / first)))))
    for kind in ("forward", "both"):
        times: list[list[float]] = [[] for _ in ready]
        for turn in range(max((count for _, _, count in ready), default=0)):
            for (_, calls, count), taken in zip(ready, times, strict=True):
                if turn < count:
                    taken.append(clock.milliseconds(calls[kind]))
        for (row, _, _), taken in zip(ready, times, strict=True):
            row[f"{kind}_ms"] = round(statistics.median(taken), 4)
            row[f"{kind}_ms_range"] = [round(min(taken), 4), round(max(taken), 4)]
            row["rounds"] = len(taken)
            _compare(row, kind, case, dtype, moved, rates)
    return rows


def _calls(who: GpuPeer, inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    with torch.no_grad():
        prepared = {name: x.detach().contiguous() for name, x in who.prepare(inputs).items()}
        cotangents = [torch.randn_like(y) for y in _all(who.run(prepared))]
    differentiable = {name: x.clone().requires_grad_() for name, x in prepared.items()}

    def forward() -> object:
        with torch.no_grad():
            return who.run(prepared)

    def both() -> object:
        ys = _all(who.run(differentiable))
        return torch.autograd.grad(ys, list(differentiable.values()), cotangents, allow_unused=True)

    return {"forward": forward, "both": both}


def _all(ys: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [ys] if isinstance(ys, Tensor) else list(ys)


def _compare(
    row: dict[str, Any],
    kind: str,
    case: GpuCase,
    dtype: torch.dtype,
    moved: tuple[int, int] | None,
    rates: Mapping[str, float],
) -> None:
    """What part of the machine's limits that is."""
    if row["who"] == "torch SDPA":  # another function, with other limits
        return
    which, seconds = int(kind == "both"), row[f"{kind}_ms"] / 1e3
    if case.floor[which]:
        least = least_bytes(case, dtype)[which] / rates["bytes"]
        row |= {f"{kind}_floor_ms": round(1e3 * least, 4), f"{kind}_of_floor": round(least / seconds, 3)}
    row[f"{kind}_of_matmul"] = round(recurrence_flops(case)[which] / rates["flops"] / seconds, 4)
    if moved is not None and row["who"] == "statewise triton":
        row[f"{kind}_bytes"] = moved[which]
        row[f"{kind}_of_bandwidth"] = round(moved[which] / rates["bytes"] / seconds, 3)


def measure_rates(clock: Clock, device: torch.device, tiny: bool = False) -> dict[str, float]:
    """Bytes a second read and written by a copy, and operations a second of a bfloat16 matrix product."""
    size = 1 << (16 if tiny else 31)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = [clock.milliseconds(lambda: target.copy_(source)) for _ in range(12)][2:]
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in range(2))
    products = [clock.milliseconds(lambda: a @ b) for _ in range(12)][2:]
    return {
        "bytes": 2e3 * size / statistics.median(copies),
        "flops": 2e3 * n**3 / statistics.median(products),
    }


def describe_gpu(device: torch.device) -> dict[str, Any]:
    """What the table's machine is."""
    found: dict[str, Any] = {"device": str(device)}
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "name": about.name,
            "capability": [about.major, about.minor],
            "memory_bytes": about.total_memory,
            "l2_bytes": about.L2_cache_size,
            "processors": about.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found


def _list(value: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in value.split(",") if part.strip())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; what is not accepted ends the process with status 2."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", type=_list, default=(), help="only these operators, comma separated")
    parser.add_argument(
        "--lengths", type=_list, default=tuple(map(str, LENGTHS)), help="values of T besides each row's"
    )
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--peers", type=_list, help="only these peers, by the table's names; default: all that run")
    parser.add_argument(
        "--rwkv-lm", type=Path, metavar="DIR", help="a checkout of RWKV-LM: its WKV-7 kernels are built"
    )
    parser.add_argument("--vision-rwkv", type=Path, metavar="DIR", help="a checkout of Vision-RWKV, likewise")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no shape is begun after so long")
    parser.add_argument("--out", type=Path, metavar="JSON", help="where results go, after every shape")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: beside --out, of the same name")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in Triton's interpreter, at toy sizes")
    options = parser.parse_args(arguments)
    known = sorted({case.op for case in CASES})
    for name in options.ops:
        if name not in known:
            parser.error(f"--ops: {name!r}; {', '.join(known)} are accepted")
    try:
        options.lengths = tuple(sorted({int(value) for value in options.lengths}))
    except ValueError as error:
        parser.error(f"--lengths: {error}")
    if options.lengths and options.lengths[0] < 1:
        parser.error("--lengths: numbers of 1 or more are accepted")
    if options.rehearse and not gpu.interpreting():
        parser.error("--rehearse needs Triton's interpreter: TRITON_INTERPRET=1 in the environment")
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --rehearse goes through the motions without one")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 1 if one of our kernels is wrong or fails, 3 if the device did not survive a contestant."""
    options = parse(arguments)
    began = time.perf_counter()
    device = torch.device("cpu" if options.rehearse else "cuda")
    clock: Clock = RehearsalClock() if options.rehearse else CudaClock(device)
    dtype = getattr(torch, options.dtype)
    rates = measure_rates(clock, device, tiny=options.rehearse)
    document: dict[str, Any] = {
        "kind": "gpu ops",
        "rehearsal": options.rehearse,
        "machine": describe() | {"accelerator": describe_gpu(device)},
        "dtype": options.dtype,
        "copy_bytes_per_second": round(rates["bytes"]),
        "matmul_flops_per_second": round(rates["flops"]),
        "complete": False,
        "cases": [],
        "left_out": [],
        "faults": [],
    }

    def keep() -> None:
        document["seconds"] = round(time.perf_counter() - began, 1)
        document["load_after"] = round(os.getloadavg()[0], 2)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")

    checkouts = {"rwkv_lm": options.rwkv_lm, "vision_rwkv": options.vision_rwkv}
    for case in CASES:
        if options.ops and case.op not in options.ops:
            continue
        own = toy(case) if options.rehearse else case
        title = own.label + particulars(case)
        if _late(began, options.minutes):
            document["left_out"].append(title)
            continue
        peers, absent = find_gpu_peers(own, checkouts, options.peers)
        yardstick = attention(own)
        wanted = yardstick is not None and (options.peers is None or yardstick.name in options.peers)
        contestants = [*our_peers(own), *peers, *([yardstick] if yardstick is not None and wanted else [])]
        print(f"\n{title}, {options.dtype}", flush=True)
        errors = errors_of(own, contestants, dtype, device, own.time if options.rehearse else min(JUDGED, own.time))
        entry: dict[str, Any] = {"label": title, "op": own.op, "own": [own.batch, own.time], "absent": absent}
        entry |= {"errors": errors, "rows": [], "floor": list(own.floor)}
        document["cases"].append(entry)
        fit, faults = _fit(own, contestants, errors)
        document["faults"] += faults
        # Its own shape first: if time runs out, that is what there is.
        every = [own.time, *(length for length in _lengths(options, own) if length != own.time)]
        for length in every:
            shape = own if length == own.time else scaled(own, length)
            if _late(began, options.minutes):
                document["left_out"].append(shape.label + particulars(case))
                continue
            try:
                rows = measure(shape, fit, dtype, device, clock, rates, (1, 1) if options.rehearse else (5, 50))
            except Exception as error:
                document["faults"].append(f"{shape.label}: {_told(error)}")
                print(f"  {document['faults'][-1]}", flush=True)
                keep()
                if not _alive(device):
                    print("the device does not answer any more; what was measured is kept", flush=True)
                    return 3
                continue
            if device.type == "cuda":
                torch.cuda.empty_cache()  # for the next shape's large pieces
            entry["rows"] += rows
            entry["rows"].sort(key=lambda row: row["T"])
            for row in rows:
                told = row.get("skipped") or f"{row['forward_ms']:9.3f} {row['both_ms']:9.3f} ms"
                print(f"  B={row['B']:<3} T={row['T']:<6} {row['who']:22} {told}", flush=True)
            keep()
            if not _alive(device):
                print("the device does not answer any more; what was measured is kept", flush=True)
                return 3
    document["complete"] = not document["left_out"]
    keep()
    plot = options.plot or (options.out.with_suffix(".png") if options.out is not None else None)
    if plot is not None:
        draw_gpu(document, plot)
    print("\n" + gpu_table(document))
    return int(bool(document["faults"]))


def _lengths(options: argparse.Namespace, own: GpuCase) -> list[int]:
    return [own.time // 2, own.time] if options.rehearse else list(options.lengths)


def _late(began: float, minutes: float) -> bool:
    return time.perf_counter() - began > 60 * minutes


def _alive(device: torch.device) -> bool:
    """Whether the device still computes: after a fault in a kernel no later call of this process does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _fit(
    case: GpuCase, contestants: Sequence[GpuPeer], errors: Mapping[str, Mapping[str, Any]]
) -> tuple[list[GpuPeer], list[str]]:
    """Who is timed, and what is wrong with ours."""
    fit, faults = [], []
    for who in contestants:
        found = errors[who.name]
        reason = found.get("failed")
        # Written so that NaN, too, is a difference; alike keys are told, and not judged by.
        wrong = {name: gap for name, gap in found.get("random", {}).items() if not gap <= SAME}
        if reason is None and wrong:
            name = max(wrong, key=lambda key: wrong[key])
            reason = f"{name} differs from float64 by {wrong[name]:.1e}"
        if reason is None:
            fit.append(who)
            continue
        print(f"  {who.name}: not timed: {reason}", flush=True)
        if who.name == "statewise triton":
            faults.append(f"{case.label}: {reason}")
    return fit, faults


if __name__ == "__main__":
    raise SystemExit(main())
