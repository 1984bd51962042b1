"""Train on a disk that fills up, and on one that turns read-only; run by ``test_disk.py`` in a process of its own.

Modes: ``tmpfs FOLDER`` really does it, on a small tmpfs mounted on FOLDER; it needs the right to mount, which
``unshare --map-root-user --mount`` gives where user namespaces are allowed. ``limit FOLDER`` simulates a full disk by
the largest size a file may have (RLIMIT_FSIZE), which any process may lower: writes beyond it fail as on a full disk,
with another number. Prints one line of JSON: case → [error type, message] and what was found afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kill_loop import half_written, tiny_config, train_quietly

from statewise.training import TrainConfig, latest_snapshot
from statewise.training.snapshot import verify_snapshot


def attempt(config: TrainConfig) -> dict[str, Any]:
    """What came of training, and whether the newest snapshot is sound."""
    try:
        train_quietly(config)
        outcome = ["", ""]
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    out = Path(config.out)
    newest = latest_snapshot(out)
    return {
        "error": outcome,
        "newest_sound_step": None if newest is None else verify_snapshot(newest),
        "half_written": half_written(out),
    }


def main(mode: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    config = tiny_config(folder, "run", steps=6, save_every=3, tensorboard=False, plot=False)
    resumed = dataclasses.replace(config, steps=30, resume=True)
    found["enough room"] = attempt(config)
    if mode == "tmpfs":
        ballast = folder / "ballast"
        with open(ballast, "wb", buffering=0) as handle:
            try:
                while handle.write(b"\0" * 4096):
                    pass
            except OSError:
                handle.truncate(handle.tell() - 40_000)  # room for some records and half a snapshot
        found["full"] = attempt(resumed)
        ballast.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        found["read-only, resumed"] = attempt(resumed)
        found["read-only, new"] = attempt(dataclasses.replace(config, out=str(folder / "new")))
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # without this the kernel kills, which the kill loop covers
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = max(path.stat().st_size for path in Path(config.out).rglob("*"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, before[1]))
        found["full"] = attempt(resumed)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found["room again"] = attempt(resumed)
    return found


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
