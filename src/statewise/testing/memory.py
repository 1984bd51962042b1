"""How much memory something takes."""

from __future__ import annotations

import ctypes
from pathlib import Path

from statewise.ops.memory import release

__all__ = ["resident_peak"]


def resident_peak(*, reset: bool) -> int | None:
    """Bytes of memory at their highest since the last reset (a reset gives what is held now). ``None`` off Linux."""
    try:
        if reset:
            # What we or the C library keep for later would count as held, and hide what the next run takes.
            release()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except (OSError, AttributeError):
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), None)
