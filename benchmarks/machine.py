"""Where and with what a benchmark ran."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["describe", "resident_peak"]

_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Date, machine and versions, as every result records them."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": _value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory": _value("/proc/meminfo", "MemTotal"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks")),
    }


def resident_peak(*, reset: bool) -> int | None:
    """Bytes of memory at their highest since the last reset (a reset gives what is held now). ``None`` off Linux."""
    try:
        if reset:
            # Blocks that the C library keeps for later would count as held, and hide what the next run takes.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        peak = _value("/proc/self/status", "VmHWM")
    except (OSError, AttributeError):
        return None
    return None if peak is None else int(peak.split()[0]) * 1024


def _value(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; ``None`` where it is none, or git is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
