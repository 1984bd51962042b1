"""The directory of a run: who may write into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from statewise.errors import SnapshotError
from statewise.training.snapshot import latest_snapshot, sweep_run

__all__ = ["check_out", "hold_run"]

_LOCK = "train.lock"
# What a trainer may leave that was killed before its first snapshot; a new run starts over it.
_OWN = {_LOCK, "config.toml", "snapshots", "tokens"}


def check_out(out: Path, *, resume: bool) -> Path | None:
    """The snapshot to continue from, or ``None`` for a new run.

    Raises:
        ValueError: ``out`` holds something and is not to be resumed, or is to be resumed and holds no snapshot.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is a file; a directory is accepted")
    last = latest_snapshot(out)
    if resume:
        if last is None:
            raise ValueError(f"nothing to resume: {out} holds no snapshot")
        return last
    if last is not None:
        raise ValueError(f"{out} already holds a run (newest snapshot: {last.name}); resume it, or give another out")
    if out.is_dir():
        foreign = [entry.name for entry in out.iterdir() if entry.name not in _OWN and not entry.name.startswith(".")]
        if foreign:
            raise ValueError(f"{out} is not empty (it holds {min(foreign)!r}); give another out")
    return None


@contextlib.contextmanager
def hold_run(out: Path) -> Iterator[None]:
    """Make ``out``, keep every other trainer off it, and clear what killed ones left half-written.

    The kernel frees the lock with the process, however that ends.

    Raises:
        ValueError: another trainer holds it.
        SnapshotError: the directory cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise SnapshotError(f"{out}: cannot write here: {error.strerror}") from error
    try:
        _lock(descriptor, out)
        try:
            sweep_run(out)
        except OSError as error:
            raise SnapshotError(f"{error.filename or out}: cannot clean up here: {error.strerror}") from error
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; there, two trainers on one directory are the user's to avoid
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another trainer (process {os.read(descriptor, 32).decode()}) is writing to {out}") from error
    with contextlib.suppress(OSError):  # on a full disk the number is missing, the lock is held all the same
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
