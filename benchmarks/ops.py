"""Operators over length: ours beside the published torch paths, in one run, on one machine.

    python -m benchmarks.ops --out benchmarks/results/DATE-ops-cpu.json

Peers come from their published packages (`benchmarks/constraints-peers.txt`, into an environment of their own); RWKV-LM
publishes none, so its loop is read from a checkout named by ``--rwkv-lm``. Before anything is timed its output is held
against our reference loop and its gradients against ours: what differs is not timed. Rounds are interleaved, medians
are told, and a length is left out, with the reason, where a shorter one says that it would take longer than ``--cap``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.forms import FORMS
from benchmarks.machine import describe
from benchmarks.plot import draw_growth, growth_table
from statewise import ops
from statewise.files import atomic_write
from statewise.ops.memory import keep_freed_memory
from statewise.testing.memory import resident_peak
from statewise.testing.peers import PEERS, Peer, Run, find_peers, rwkv_lm_loop
from statewise.testing.peers import ours as our_operator

SHAPES = {
    "wkv4": "B4 C512",
    "wkv6": "B2 H8 N64",
    "wkv6-constant": "B2 H8 N64",
    "wkv6-head": "B2 H8 N64",
    "wkv7": "B2 H8 N64",
    "selective_scan": "B2 D1536 N16",
    "ssd": "B2 H24 P64 N128",
    "bi_wkv": "B4 C192",
    "causal_conv1d": "B2 D1536 W4, silu",
    "token_mix": "B4 C512 M3",
}
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)

#: (of outputs, of gradients), relative to the largest value: sums over all positions, in another order.
TOLERANCES = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 6e-2)}
REFERENCE = "statewise reference"
SHORT = 0.05  # seconds: what lasts less is run for so long, untimed, before every timing
LONGEST_REFERENCE = 1024  # it is there for its shape, which shorter lengths show


def _options(op: str) -> dict[str, Any]:
    return {"activation": "silu"} if op == "causal_conv1d" else {}


def draw(op: str, time: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs at the sizes of SHAPES, in the ranges that a trained model has; parameters stay float32."""
    torch.manual_seed(0)
    if op in ("wkv4", "bi_wkv"):
        k, v = torch.randn(2, 4, time, 512 if op == "wkv4" else 192)
        channels = k.shape[-1]
        inputs = {"k": k, "v": v, "log_w": -torch.rand(channels), "u": torch.randn(channels)}
    elif op.startswith("wkv6"):
        shape = (2, time, 8, 64)
        decays = {"wkv6": shape, "wkv6-constant": shape[2:], "wkv6-head": shape[2:3]}[op]
        log_w = -torch.exp(torch.randn(decays) - 2)
        r, k, v = torch.randn(3, *shape)
        inputs = {"r": r, "log_w": log_w, "k": k / 8, "v": v, "u": torch.randn(8, 64)}
    elif op == "wkv7":
        shape = (2, time, 8, 64)
        direction = torch.nn.functional.normalize(torch.randn(shape), dim=-1)
        inputs = {
            "r": torch.randn(shape),
            "log_w": -0.6065306597 * torch.sigmoid(torch.randn(shape)),
            "k": torch.randn(shape) / 8,
            "v": torch.randn(shape),
            "a": -direction,
            "b": direction * torch.rand(shape),
        }
    elif op == "ssd":
        inputs = {
            "x": torch.randn(2, time, 24, 64),
            "dt": torch.rand(2, time, 24) * 0.1,
            "A": -(torch.rand(24) * 15 + 1),
            "B": torch.randn(2, time, 1, 128),
            "C": torch.randn(2, time, 1, 128) / 8,
        }
    elif op == "causal_conv1d":
        inputs = {"x": torch.randn(2, time, 1536), "weight": torch.randn(1536, 4), "bias": torch.randn(1536)}
    elif op == "token_mix":
        inputs = {"x": torch.randn(4, time, 512), "mix": torch.rand(3, 512)}
    else:
        inputs = {
            "x": torch.randn(2, time, 1536),
            "dt": torch.rand(2, time, 1536) * 0.1,
            "A": -(torch.rand(1536, 16) * 15 + 1),
            "B": torch.randn(2, time, 16),
            "C": torch.randn(2, time, 16),
        }
    # What has a time axis is an activation.
    cast = {name: x.to(dtype) if x.dim() >= 3 else x for name, x in inputs.items()}
    return {name: x.requires_grad_() for name, x in cast.items()}


def ours(op: str, backend: str) -> Run:
    """Our own operator, with the options of its shape in SHAPES."""
    return our_operator(op.split("-")[0], backend, **_options(op))


def measure(
    op: str,
    contestants: Sequence[Peer],
    lengths: Sequence[int],
    repeats: int,
    cap: float,
    inputs_of: Callable[..., dict[str, Tensor]] = draw,
    finished: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    dtype: torch.dtype = torch.float32,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    """Time every contestant at every length.

    Args:
        op: an operator of SHAPES.
        contestants: the first is ours: its gradients are the others' yardstick.
        lengths: rising.
        repeats: rounds of one forward and one forward with backward.
        cap: seconds; a run that is expected to last longer is left out.
        inputs_of: operator and length → inputs.
        finished: called after each length with all rows so far.
        dtype: of activations.
        bandwidth: bytes a second that the machine moves; rows then tell what fraction of it is reached.

    Returns:
        One row a contestant and length, with its medians in milliseconds, or with ``skipped``, the reason.
    """
    rows: list[dict[str, Any]] = []
    last: dict[str, tuple[int, float]] = {}  # name → (length, seconds of a whole run)
    for length in lengths:
        inputs = inputs_of(op, length) if dtype == torch.float32 else inputs_of(op, length, dtype)
        with torch.no_grad():
            # The loop is the yardstick where it can be waited for; beyond, our chunked form, held to it below.
            truth = ours(op, "reference" if length <= LONGEST_REFERENCE else "torch")(inputs)
        cotangent = torch.randn_like(truth)
        gradients: list[Tensor] | None = None
        ready: list[_Contest] = []
        for who in contestants:
            row = {"op": op, "shape": SHAPES[op], "T": length, "who": who.name, "version": who.version}
            rows.append(row)
            if reason := _too_long(who.name, length, last.get(who.name), cap):
                row["skipped"] = reason
                continue
            before = resident_peak(reset=True)
            try:
                seconds, y, found = _whole(who.run, inputs, cotangent)
            except Exception as error:
                if gradients is None:  # ours: a fault, not a limit
                    raise
                row["skipped"] = f"does not run: {type(error).__name__}: {error}".rstrip(": ")
                continue
            after = resident_peak(reset=False)
            last[who.name] = (length, seconds)
            gaps = [_gap(y, truth)]
            gradients = found if gradients is None else gradients
            gaps.append(max(_gap(one, other) for one, other in zip(found, gradients, strict=True)))
            # Written so that NaN, too, is a difference.
            if not all(gap <= limit for gap, limit in zip(gaps, TOLERANCES[dtype], strict=True)):
                row["skipped"] = f"not timed: output differs by {gaps[0]:.1e}, gradients by {gaps[1]:.1e}"
                continue
            row |= {"output_difference": gaps[0], "gradient_difference": gaps[1]}
            if before is not None and after is not None:
                row["peak_mib"] = round((after - before) / 2**20)
            ready.append(_Contest(who.run, row, seconds, repeats, cap))
            del y, found
        for round_ in range(repeats):
            for contest in ready:
                contest.take(round_, inputs, cotangent)
        for contest in ready:
            contest.tell(_moved(inputs, cotangent), bandwidth)
        finished(rows)
    return rows


class _Contest:
    """One contestant at one length."""

    def __init__(self, run: Run, row: dict[str, Any], first: float, repeats: int, cap: float) -> None:
        self.run, self.row, self.first = run, row, first
        # The first run pays for imports and for memory asked of the system, so it counts only where it has to.
        self.rounds = 1 if first > cap else min(repeats, 3) if first > cap / 12 else repeats
        self.forward: list[float] = []
        self.both = [first] if first > cap else []

    def take(self, round_: int, inputs: Mapping[str, Tensor], cotangent: Tensor) -> None:
        if round_ >= self.rounds:
            return
        with torch.no_grad():
            self.warm(lambda: self.run(inputs))
            start = time.perf_counter()
            self.run(inputs)
            self.forward.append(time.perf_counter() - start)
        if len(self.both) < self.rounds:
            self.warm(lambda: _whole(self.run, inputs, cotangent))
            self.both.append(_whole(self.run, inputs, cotangent)[0])

    def warm(self, once: Callable[[], object]) -> None:
        """Whoever ran before left the caches full of something else, which what is short would be charged for."""
        until = time.perf_counter() + SHORT
        if self.first < SHORT:
            while time.perf_counter() < until:
                once()

    def tell(self, moved: tuple[int, int], bandwidth: float | None) -> None:
        for kind, values in (("forward", self.forward), ("both", self.both)):
            self.row[f"{kind}_ms"] = round(1e3 * statistics.median(values), 3)
            self.row[f"{kind}_ms_range"] = [round(1e3 * min(values), 3), round(1e3 * max(values), 3)]
            if bandwidth is not None:
                least = moved[kind == "both"] / bandwidth
                self.row[f"{kind}_of_bandwidth"] = round(1e3 * least / self.row[f"{kind}_ms"], 3)
        self.row["runs"] = len(self.both)
        op, length, who = (self.row[key] for key in ("op", "T", "who"))
        print(
            f"{op:15} T={length:<5} {who:20} {self.row['forward_ms']:10.1f} {self.row['both_ms']:10.1f} ms", flush=True
        )


def _moved(inputs: Mapping[str, Tensor], y: Tensor) -> tuple[int, int]:
    """Bytes that forward, and forward with backward, move at least: every input and output once a pass."""
    given = sum(x.nbytes for x in inputs.values())
    return given + y.nbytes, 3 * given + 2 * y.nbytes


def measure_bandwidth() -> float:
    """Bytes a second read and written by a copy of 128 MiB, the best of ten."""
    source = torch.ones(1 << 25)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / min(times)


def _too_long(name: str, length: int, before: tuple[int, float] | None, cap: float) -> str | None:
    """Why ``name`` is not run at ``length``, or ``None``; a loop's backward may grow with the square of T."""
    if name == REFERENCE and length > LONGEST_REFERENCE:
        return f"our own loop is timed up to T={LONGEST_REFERENCE}"
    if before is not None and (expected := before[1] * (length / before[0]) ** 2) > cap:
        return f"up to {expected:.0f} s expected after {before[1]:.1f} s at T={before[0]}; the cap is {cap:.0f} s"
    return None


def _whole(run: Run, inputs: Mapping[str, Tensor], cotangent: Tensor) -> tuple[float, Tensor, list[Tensor]]:
    """Seconds of one forward and backward, its output and gradients."""
    start = time.perf_counter()
    y = run(inputs)
    gradients = torch.autograd.grad(y, list(inputs.values()), cotangent)
    return time.perf_counter() - start, y.detach(), list(gradients)


def _gap(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def growth(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How each implementation's forward and backward grows: time ~ T^exponent.

    ``exponent`` is fitted over all its lengths, ``exponent_last`` is that of its last step in length, where the
    constant cost of a call weighs least.
    """
    import numpy as np

    found = []
    for op, who in dict.fromkeys((row["op"], row["who"]) for row in rows):
        points = [(r["T"], r["both_ms"]) for r in rows if (r["op"], r["who"]) == (op, who) and "both_ms" in r]
        if len(points) >= 2:
            (t0, ms0), (t1, ms1) = points[-2:]
            t, ms = np.log(np.array(points)).T
            fitted = float(np.polyfit(t, ms, 1)[0])
            exponents = {"exponent": round(fitted, 2), "exponent_last": round(math.log(ms1 / ms0, t1 / t0), 2)}
            found.append({"op": op, "who": who, "from_T": points[0][0], "to_T": t1} | exponents)
    return found


def find_contestants(op: str, names: Sequence[str] | None, rwkv_lm: Path | None) -> tuple[list[Peer], dict[str, str]]:
    """Ours, our reference and the peers asked for (``None``: all that run here); and who is absent, and why."""
    peers, absent = find_peers(op.split("-")[0])
    peers += [Peer(name, "benchmarks/forms.py", form) for name, form in FORMS.get(op, {}).items()]
    if op == "wkv7":
        if rwkv_lm is None:
            absent["RWKV-LM loop"] = "no checkout given (--rwkv-lm)"
        else:
            peers.append(rwkv_lm_loop(rwkv_lm))
    served = ops.backends()[op.split("-")[0]]
    mine = [
        Peer(f"statewise {name}", "this commit", ours(op, name))
        for name in ("native", "torch", "reference")
        if served[name].serves
    ]
    if not served["native"].serves:
        absent["statewise native"] = served["native"].reason
    if names is not None:
        peers = [peer for peer in peers if peer.name in names]
        absent = {name: reason for name, reason in absent.items() if name in names}
    return mine + peers, absent


def _names(value: str) -> list[str]:
    return value.split(",")


def main(arguments: Sequence[str] | None = None) -> None:
    known = [*(name for where in (PEERS, FORMS) for peers in where.values() for name in peers), "RWKV-LM loop"]
    parser = argparse.ArgumentParser(prog="benchmarks.ops", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ops", type=_names, default=list(SHAPES), help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--lengths", type=_names, default=list(LENGTHS), help="values of T, rising")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of activations")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="ask the C library to keep freed memory, for all alike, as `statewise train` does",
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--cap", type=float, default=60.0, help="longest single run, seconds")
    parser.add_argument("--peers", type=_names, help=f"of {', '.join(known)}; default: all that run here")
    parser.add_argument(
        "--rwkv-lm", type=Path, metavar="DIR", help="a checkout of RWKV-LM, for the official WKV-7 loop"
    )
    parser.add_argument("--out", type=Path, metavar="JSON", help="where results go, after every length")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="default: beside --out, of the same name")
    options = parser.parse_args(arguments)
    for name in options.ops:
        if name not in SHAPES:
            parser.error(f"--ops: {name!r}; {', '.join(SHAPES)} are accepted")
    for name in options.peers or ():
        if name not in known:
            parser.error(f"--peers: {name!r}; {', '.join(known)} are accepted")
    try:
        lengths = sorted({int(value) for value in options.lengths})
    except ValueError as error:
        parser.error(f"--lengths: {error}")
    if lengths[0] < 1 or options.repeats < 1 or options.threads < 1:
        parser.error("--lengths, --repeats and --threads take numbers of 1 or more")
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    kept = options.keep_memory and keep_freed_memory()
    rows: list[dict[str, Any]] = []
    bandwidth = measure_bandwidth()
    document: dict[str, Any] = {
        "kind": "ops",
        "machine": describe(),
        "repeats": options.repeats,
        "dtype": options.dtype,
        "freed_memory": "kept" if kept else "returned to the system",
        "copy_bytes_per_second": round(bandwidth),
    }

    def write(fresh: list[dict[str, Any]], complete: bool = False) -> None:
        so_far = rows + fresh
        document.update(complete=complete, load_after=round(os.getloadavg()[0], 2))
        document.update(growth=growth(so_far), absent=absent, rows=so_far)
        if options.out is not None:
            atomic_write(options.out, json.dumps(document, indent=1) + "\n")

    absent: dict[str, str] = {}
    for op in options.ops:
        contestants, missing = find_contestants(op, options.peers, options.rwkv_lm)
        absent |= missing
        rows += measure(
            op,
            contestants,
            lengths,
            options.repeats,
            options.cap,
            finished=write,
            dtype=getattr(torch, options.dtype),
            bandwidth=bandwidth,
        )
    write([], complete=True)
    print("\n" + growth_table(document))
    plot = options.plot or (options.out.with_suffix(".png") if options.out is not None else None)
    if plot is not None:
        draw_growth(document, plot)


if __name__ == "__main__":
    main()
