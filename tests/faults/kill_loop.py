"""Kill a trainer at random instants, resume it, and hold the result against a run that nobody disturbed.

``python -m tests.faults.kill_loop --kills 100`` prints a summary and exits 1 if anything differs. This process imports
torch once and forks a child for every sitting, so a kill costs a fraction of a second; it never runs a backward pass
itself, which forked children would not survive.

A kill falls at a random instant of the whole sitting, or of its very start (before the first snapshot, while an old
one is read), or shortly after a half-written snapshot was seen on the disk (inside saves, renames and prunes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from statewise.models import create
from statewise.training import TrainConfig, latest_snapshot, train
from statewise.training.metrics import VOLATILE, read_metrics
from statewise.training.optimizer import build_optimizer
from statewise.training.plot import draw_curve
from statewise.training.snapshot import list_snapshots, verify_snapshot

KILLS_A_RUN = 10
LONGEST_START, LONGEST_SAVE = 0.06, 0.015  # seconds


def tiny_config(folder: Path, name: str, **changes: Any) -> TrainConfig:
    """Steps of milliseconds, a snapshot every third, everything switched on that a snapshot must hold."""
    text = folder / "text.txt"
    if not text.exists():
        words = random.Random(7).choices(["state ", "is ", "a ", "value ", "wise ", "and ", "so ", "\n"], k=1000)
        text.write_text("".join(words))
    base = TrainConfig(
        model="rwkv4",
        data=str(text),
        out=str(folder / name),
        steps=60,
        num_layers=1,
        width=16,
        context=8,
        batch_size=2,
        accumulate=2,
        carry_state=True,
        log_every=2,
        save_every=3,
        eval_every=30,
        eval_tokens=64,
    )
    return dataclasses.replace(base, **changes)


def in_child(work: Callable[[], None]) -> int:
    """Fork; the child does ``work`` and exits 0, or 1 with its traceback on standard error. Returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def warm_up() -> None:
    """Import here what a trainer imports on the way, so that every child starts with it."""
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401

    model = create("rwkv4", vocab_size=256, num_layers=1, width=16)
    build_optimizer(model, TrainConfig(model="rwkv4").resolved())
    with tempfile.TemporaryDirectory() as folder:
        draw_curve([{"step": 1, "bits_per_byte": 8.0}], Path(folder) / "loss.png", "warm")


def run_child(config: TrainConfig) -> None:
    """Train to the end in a child."""
    status = os.waitpid(in_child(lambda: train_quietly(config)), 0)[1]
    if status != 0:
        raise AssertionError(f"a trainer that was left alone ended with status {status}")


def train_quietly(config: TrainConfig) -> None:
    train(config, progress=lambda report: None)


def half_written(out: Path) -> list[str]:
    """What a killed writer left: in the run and one level below it."""
    folders = [out, out / "snapshots"]
    return [entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.name[0] == "."]


def fingerprint(out: Path) -> dict[str, Any]:
    """All that must be equal at the end: tensors of every kept snapshot, its record, the metrics, the file names."""
    found: dict[str, Any] = {"files": sorted(str(path.relative_to(out)) for path in out.rglob("*"))}
    found["files"] = [name for name in found["files"] if not name.startswith("tensorboard/")]
    for step, path in list_snapshots(out):
        verify_snapshot(path)
        for name in ("model", "optimizer", "random", "state"):
            for key, tensor in load_file(path / f"{name}.safetensors").items():
                found[f"{step}/{name}/{key}"] = (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
        record = json.loads((path / "trainer.json").read_text())
        found[f"{step}/record"] = {k: v for k, v in record.items() if k not in ("seconds", "config")}
    records = read_metrics(out / "metrics.jsonl")
    found["metrics"] = [{k: v for k, v in record.items() if k not in VOLATILE} for record in records]
    return found


def kill_once(config: TrainConfig, out: Path, duration: float, chance: random.Random) -> bool:
    """One sitting that is killed; False where it came to its end before."""
    resume = latest_snapshot(out) is not None
    pid = in_child(lambda: train_quietly(dataclasses.replace(config, resume=resume)))
    started = time.perf_counter()
    aim = chance.choice(["anywhere", "start", "save"])
    time.sleep(chance.uniform(0.0, LONGEST_START if aim == "start" else duration / 2))
    while aim == "save" and time.perf_counter() - started < duration:
        if half_written(out):
            time.sleep(chance.uniform(0.0, LONGEST_SAVE))
            break
    os.kill(pid, signal.SIGKILL)  # of a child that ended by itself, this is ignored: nobody has waited for it yet
    status = os.waitpid(pid, 0)[1]
    if status != 0 and not os.WIFSIGNALED(status):
        raise AssertionError(f"the trainer ended with status {status}")
    return os.WIFSIGNALED(status)


def kill_loop(folder: Path, kills: int, seed: int, **changes: Any) -> dict[str, Any]:
    """Kill and resume until ``kills`` kills have landed.

    Returns:
        How many runs and kills there were, how many kills left half-written files, and what differed (nothing, else
        the name of the run and of the first thing).
    """
    chance = random.Random(seed)
    warm_up()
    began = time.perf_counter()
    run_child(tiny_config(folder, "unbroken", **changes))
    duration = time.perf_counter() - began
    expected = fingerprint(folder / "unbroken")
    landed, inside, runs, before_first = 0, 0, 0, 0
    differences: list[str] = []
    while landed < kills:
        runs += 1
        config = tiny_config(folder, f"run-{runs}", **changes)
        out = Path(config.out)
        for _ in range(min(KILLS_A_RUN, kills - landed)):
            if kill_once(config, out, duration, chance):
                landed += 1
                inside += bool(half_written(out))
                before_first += latest_snapshot(out) is None
                for _, snapshot in list_snapshots(out):
                    verify_snapshot(snapshot)
        run_child(dataclasses.replace(config, resume=latest_snapshot(out) is not None))
        got = fingerprint(out)
        wrong = [key for key in sorted({*got, *expected}) if got.get(key) != expected.get(key)]
        differences += [f"{out.name}: {wrong[0]} and {len(wrong) - 1} more"] if wrong else []
        differences += [f"{out.name}: left {name}" for name in half_written(out)]
    return {
        "kills": landed,
        "left_half_written_files": inside,
        "before_the_first_snapshot": before_first,
        "runs": runs,
        "compared_values": len(expected),
        "differences": differences,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a trainer at random instants and compare what it ends with.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="rwkv4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        fields = {"head_size": 16} if arguments.model == "rwkv7" else {}
        summary = kill_loop(Path(folder), arguments.kills, arguments.seed, model=arguments.model, model_fields=fields)
    print(json.dumps(summary))
    return 1 if summary["differences"] else 0


if __name__ == "__main__":
    sys.exit(main())
