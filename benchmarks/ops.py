"""Operators over length: ours beside the published torch paths, in one run, on one machine.

    python -m benchmarks.ops --out benchmarks/results/DATE-ops-cpu.json

Peers come from their published packages (`pip install -r benchmarks/constraints-peers.txt` into an environment of its
own); RWKV-LM publishes no package, so its loop is read from a checkout named by ``--rwkv-lm``. Every peer's output is
compared with ours before it is timed. Rounds are interleaved, medians are told, and a length is left out, with the
reason recorded, once one run of a shorter one says that it would take longer than ``--cap`` seconds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statewise import ops
from statewise.testing.peers import Peer, find_peers, rwkv_lm_loop

SHAPES = {"wkv4": "B4 C512", "wkv7": "B2 H8 N64", "selective_scan": "B2 D1536 N16"}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def draw(op: str, time: int) -> dict[str, Tensor]:
    """Inputs at the sizes of SHAPES, as they come in a trained model."""
    torch.manual_seed(0)
    if op == "wkv4":
        shape = (4, time, 512)
        inputs = {"k": torch.randn(shape), "v": torch.randn(shape), "log_w": -torch.rand(512), "u": torch.randn(512)}
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
    else:
        inputs = {
            "x": torch.randn(2, time, 1536),
            "dt": torch.rand(2, time, 1536) * 0.1,
            "A": -(torch.rand(1536, 16) * 15 + 1),
            "B": torch.randn(2, time, 16),
            "C": torch.randn(2, time, 16),
        }
    return {name: x.requires_grad_() for name, x in inputs.items()}


def ours(op: str, backend: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return getattr(ops, op)(**inputs, backend=backend)[0]

    return run


def seconds(run: Callable[[Mapping[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], backward: bool) -> float:
    start = time.perf_counter()
    if backward:
        y = run(inputs)
        torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))
    else:
        with torch.no_grad():
            run(inputs)
    return time.perf_counter() - start


def measure(op: str, peers: list[Peer], lengths: tuple[int, ...], repeats: int, cap: float) -> list[dict[str, Any]]:
    """One row per (implementation, length)."""
    rows = []
    last: dict[str, tuple[int, float]] = {}  # implementation → (length, seconds of a whole run)
    for length in lengths:
        inputs = draw(op, length)
        with torch.no_grad():
            truth = ours(op, "torch")(inputs)
        ready = []
        for peer in peers:
            row: dict[str, Any] = {"op": op, "shape": SHAPES[op], "T": length, "who": peer.name}
            # Peers' backward grows with the square of T, so a doubled T is expected to cost four times as much.
            before = last.get(peer.name)
            if before is not None and before[1] * (length / before[0]) ** 2 > cap:
                rows.append({**row, "skipped": f"expected over {cap:.0f} s, {before[1]:.1f} s at T={before[0]}"})
                continue
            with torch.no_grad():
                y = peer.run(inputs)
            gap = float((y - truth).abs().max() / truth.abs().max())
            if not gap <= 1e-4:
                rows.append({**row, "skipped": f"output differs from ours by {gap:.1e}: not timed"})
                continue
            first = seconds(peer.run, inputs, True)
            last[peer.name] = (length, first)
            ready.append((peer, {**row, "version": peer.version, "difference": gap}, first))
        times: dict[str, dict[str, list[float]]] = {p.name: {"forward": [], "both": []} for p, _, _ in ready}
        for round_ in range(repeats):
            for peer, _, first in ready:
                if round_ and first > cap / 8:  # one timing says enough of what takes this long
                    continue
                times[peer.name]["forward"].append(seconds(peer.run, inputs, False))
                times[peer.name]["both"].append(seconds(peer.run, inputs, True))
        for peer, row, _ in ready:
            for kind, values in times[peer.name].items():
                row[f"{kind}_ms"] = round(1e3 * statistics.median(values), 3)
                row[f"{kind}_ms_range"] = [round(1e3 * min(values), 3), round(1e3 * max(values), 3)]
            row["runs"] = len(times[peer.name]["both"])
            rows.append(row)
            print(
                f"{op:15} T={length:<5} {peer.name:16} {row['forward_ms']:10.1f} {row['both_ms']:10.1f} ms", flush=True
            )
    return rows


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Exponent p of time ~ T^p, forward and backward, fitted over each implementation's timed lengths."""
    import numpy as np

    found = {}
    for key in dict.fromkeys((row["op"], row["who"]) for row in rows):
        points = [(row["T"], row["both_ms"]) for row in rows if (row["op"], row["who"]) == key and "both_ms" in row]
        if len(points) >= 3:
            t, ms = np.log(np.array(points)).T
            found["/".join(key)] = round(float(np.polyfit(t, ms, 1)[0]), 2)
    return found


def draw_plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time over T, both axes logarithmic, one panel an operator."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["op"] for row in rows))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, op in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for who in dict.fromkeys(row["who"] for row in rows if row["op"] == op):
            points = [(r["T"], r["both_ms"]) for r in rows if (r["op"], r["who"]) == (op, who) and "both_ms" in r]
            if points:
                mine = who.startswith("statewise")
                axis.loglog(*zip(*points, strict=True), marker="o", label=who, linewidth=2.5 if mine else 1.2)
        axis.set(title=f"{op} ({SHAPES[op]}, float32)", xlabel="T", ylabel="forward + backward, ms")
        axis.set_xticks(LENGTHS, [str(t) for t in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def machine() -> dict[str, Any]:
    """Where and with what this ran."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
        "load_before": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", default=",".join(SHAPES))
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cap", type=float, default=60.0, help="longest single run of a peer, seconds")
    parser.add_argument("--rwkv-lm", type=Path, help="RWKV-v7/rwkv_v7_demo.py of an RWKV-LM checkout")
    parser.add_argument("--out", type=Path, help="JSON file; a plot of the same name is drawn beside it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = machine()
    lengths = tuple(int(value) for value in options.lengths.split(","))
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for op in options.ops.split(","):
        peers, missing = find_peers(op)
        absent |= missing
        if op == "wkv7" and options.rwkv_lm is not None:
            peers.append(Peer("RWKV-LM loop", "checkout", rwkv_lm_loop(options.rwkv_lm)))
        mine = [Peer("statewise", "this commit", ours(op, "torch"))]
        mine.append(Peer("statewise reference", "this commit", ours(op, "reference")))
        rows += measure(op, mine + peers, lengths, options.repeats, options.cap)
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}")
    exponents = growth(rows)
    print(json.dumps(exponents, indent=1))
    if options.out is not None:
        document = {"machine": about, "growth_exponents": exponents, "absent": absent, "rows": rows}
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        draw_plot(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
