"""How far the reading of a checkpoint has come: told to a callable, or shown as a bar on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

from statewise.weights.claims import counted
from statewise.weights.files import open_directory

__all__ = ["Progress", "reading"]

#: ``progress(done, total)``, in bytes.
Progress: TypeAlias = Callable[[int, int], None]

#: A file this large takes seconds to read; below, a bar would only flicker.
LARGE = 1 << 30


@contextlib.contextmanager
def reading(path: Path, progress: bool | Progress | None) -> Iterator[None]:
    """Within, bytes of tensors that are read count towards the size of the checkpoint at ``path``.

    Args:
        path: a file or a directory; one that does not exist counts as empty, and is left to the reader to refuse.
        progress: see :func:`statewise.load`.

    Raises:
        ValueError: ``progress`` is something else.
        WeightsError: a directory that is no checkpoint, as reading it would.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ValueError(f"progress is {progress!r}; None, True, False or a callable is accepted")
    if progress is False:
        yield
        return
    parts = open_directory(path)[1] if path.is_dir() else [path]
    total = sum(part.stat().st_size for part in parts if part.is_file())
    if progress is None and (total < LARGE or sys.stderr is None or not sys.stderr.isatty()):
        yield
        return
    with contextlib.ExitStack() as stack:
        tell = progress if callable(progress) else stack.enter_context(_bar(path.name, total))
        tell(0, total)
        done = 0

        def count(size: int) -> None:
            nonlocal done
            # One record may be told as several tensors, and is then read several times.
            done = min(done + size, total)
            tell(done, total)

        with counted(count):
            yield
        if done < total:  # headers
            tell(total, total)


@contextlib.contextmanager
def _bar(name: str, total: int) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(f"load {name}", total=total)
        yield lambda done, _: bar.update(task, completed=done)
