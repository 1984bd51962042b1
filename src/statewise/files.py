"""Files that are either wholly there or not there at all.

A writer fills a temporary file beside its destination; the file is flushed to disk, renamed over the destination and
the directory entry is flushed too. A process killed at any instant leaves the old file or the new one, and at most a
stray temporary file, which :func:`sweep` removes.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

__all__ = ["atomic_write", "flush_directory", "sweep"]

_MARK = ".statewise-tmp"
_TEMPORARY = re.compile(r"\..+\.[A-Za-z0-9_]+" + re.escape(_MARK))


def atomic_write(path: str | os.PathLike[str], content: bytes | str | Callable[[Path], None]) -> None:
    """Write ``path`` in one step.

    Args:
        path: destination; its directory must exist.
        content: bytes, text (written as UTF-8), or a function that fills the temporary path it is given.

    Raises:
        OSError: the disk is full, the directory is read-only, ...; the destination is then as it was.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=_MARK, dir=target.parent)
    temporary = Path(name)
    try:
        os.close(descriptor)
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        # mkstemp makes files private; a finished file takes the permissions any new file would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_directory(target.parent)


def flush_directory(directory: Path) -> None:
    """Make renames inside ``directory`` survive a power cut (does nothing where directories cannot be opened)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def sweep(directory: str | os.PathLike[str]) -> list[Path]:
    """Remove temporary files that killed writers left in ``directory`` (not below it); return what was removed."""
    stale = [entry for entry in Path(directory).iterdir() if _TEMPORARY.fullmatch(entry.name) and entry.is_file()]
    for entry in stale:
        entry.unlink(missing_ok=True)
    return stale
