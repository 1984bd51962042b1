"""Snapshots of a run: directories that are wholly there or not there at all, and that know their own contents.

``OUT/snapshots/step-00001000/`` holds the files of one instant and ``manifest.json``, which lists the size and SHA-256
of each and carries a digest of itself. A snapshot is filled under a temporary name, every file is flushed to disk, the
manifest comes last, and one rename makes it appear; removing one starts with the rename back. So a process killed at
any instant leaves whole snapshots and at most temporary directories, which :func:`sweep_run` removes; a snapshot that
is there but does not match its manifest was damaged afterwards, and is refused rather than passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from statewise.errors import SnapshotError
from statewise.files import flush_directory, sweep

__all__ = ["latest_snapshot", "list_snapshots", "sweep_run", "verify_snapshot", "write_snapshot"]

_FORMAT = "statewise-snapshot"
_VERSION = 1
_MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 1 << 20
_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = re.compile(r"\.step-\d{8,}\..+\.statewise-tmp")


def write_snapshot(out: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Make the snapshot of ``step`` appear, then remove all but the newest ``keep``.

    Args:
        out: directory of the run; must exist.
        step: optimiser steps done.
        fill: writes files (no directories) into the empty directory it is given.
        keep: snapshots left in the end, this one included; at least 1.

    Raises:
        SnapshotError: the disk is full, the directory is read-only, ...; earlier snapshots are as they were.
    """
    from safetensors import SafetensorError

    folder = out / "snapshots"
    target = folder / f"step-{step:08d}"
    temporary: Path | None = None
    try:
        if not folder.is_dir():
            folder.mkdir()
            flush_directory(out)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".statewise-tmp", dir=folder))
        fill(temporary)
        entries = {}
        for path in sorted(temporary.iterdir()):
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
            entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        with open(temporary / _MANIFEST, "wb") as handle:
            handle.write(_manifest({"format": _FORMAT, "version": _VERSION, "step": step, "files": entries}))
            handle.flush()
            os.fsync(handle.fileno())
        # mkdtemp makes directories private; a finished snapshot takes the permissions any new directory would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o777 & ~mask)
        flush_directory(temporary)
        os.rename(temporary, target)  # fails where a snapshot of this step is, as it cannot be empty
        flush_directory(folder)
        for _, old in list_snapshots(out)[:-keep]:
            doomed = folder / f".{old.name}.old.statewise-tmp"
            os.rename(old, doomed)
            shutil.rmtree(doomed)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        last = latest_snapshot(out)
        kept = "there is no earlier one" if last is None else f"the last good one is {last}"
        raise SnapshotError(f"{target}: cannot write this snapshot: {error}; {kept}") from error
    return target


def list_snapshots(out: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every snapshot of the run in ``out``, oldest first; their contents are not looked at."""
    folder = out / "snapshots"
    if not folder.is_dir():
        return []
    found = [(match, entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)) and entry.is_dir()]
    return sorted((int(match[1]), entry) for match, entry in found)


def latest_snapshot(out: str | os.PathLike[str]) -> Path | None:
    """Directory of the newest snapshot of the run in ``out``, or ``None``; :func:`verify_snapshot` checks it.

    It is also a checkpoint: ``statewise.load`` opens it.
    """
    snapshots = list_snapshots(Path(out))
    return snapshots[-1][1] if snapshots else None


def verify_snapshot(path: str | os.PathLike[str]) -> int:
    """Read a snapshot from end to end and hold it against its manifest; return its step.

    Raises:
        SnapshotError: a file is missing, cut short, grown or changed by as little as a bit; names it and the reason.
    """
    directory = Path(path)
    manifest = directory / _MANIFEST
    listed = _read_manifest(manifest)
    step, files = listed["step"], listed["files"]
    if directory.name != f"step-{step:08d}":
        raise SnapshotError(f"{directory}: the manifest is of step {step}: the directory was renamed")
    for name, entry in files.items():
        file = directory / name
        try:
            size, digest = file.stat().st_size, _sha256(file)
        except OSError as error:
            raise SnapshotError(f"{file}: cannot be read: {error.strerror}: the snapshot is incomplete") from error
        if size != entry["bytes"]:
            raise SnapshotError(f"{file}: {size} bytes, the manifest says {entry['bytes']}: the snapshot is damaged")
        if digest != entry["sha256"]:
            raise SnapshotError(f"{file}: the contents do not match their SHA-256: the snapshot is damaged")
    return int(step)


def sweep_run(out: Path) -> None:
    """Remove what killed trainers left half-written in ``out``; only for the holder of the run's lock."""
    for folder in (out, out / "tokens", out / "snapshots"):
        if folder.is_dir():
            sweep(folder)
    if (folder := out / "snapshots").is_dir():
        for entry in folder.iterdir():
            if _TEMPORARY.fullmatch(entry.name):
                shutil.rmtree(entry)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _manifest(body: dict[str, Any]) -> bytes:
    """The one spelling a manifest can have, so that any flipped bit in it shows."""
    plain = json.dumps(body, indent=1, sort_keys=True)
    digest = hashlib.sha256(plain.encode()).hexdigest()
    return (json.dumps({**body, "manifest_sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as handle:
            content = handle.read(_LARGEST_MANIFEST + 1)
    except OSError as error:
        raise SnapshotError(f"{path}: cannot be read: {error.strerror}: not a whole snapshot") from error
    if len(content) > _LARGEST_MANIFEST:
        raise SnapshotError(f"{path}: larger than {_LARGEST_MANIFEST} bytes: not a manifest")
    try:
        body: dict[str, Any] = json.loads(content)
        body.pop("manifest_sha256")
        intact = _manifest(body) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise SnapshotError(f"{path}: does not match its own SHA-256: the snapshot is damaged")
    if body.get("format") != _FORMAT or body.get("version") != _VERSION:
        found = f"{body.get('format')!r} version {body.get('version')!r}"
        raise SnapshotError(f"{path}: {found}; this release reads {_FORMAT!r} version {_VERSION}")
    files = body.get("files")
    honest = isinstance(files, dict) and all(
        os.path.basename(name) == name and isinstance(entry, dict) and set(entry) == {"bytes", "sha256"}
        for name, entry in files.items()
    )
    if not honest or not isinstance(body.get("step"), int):
        raise SnapshotError(f"{path}: does not list files as a manifest does")
    return body
