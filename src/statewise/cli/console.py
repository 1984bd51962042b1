"""What commands print: tables and progress on a terminal, plain lines off one, JSON for programs.

Results go to standard output, progress to standard error.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["Progress", "print_json", "print_table", "progress", "write_text"]

_SECONDS_BETWEEN_LINES = 5.0


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """One JSON document on standard output. NaN and infinities, which JSON lacks, become null."""
    print(json.dumps(_plain(value), allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table; off a terminal, columns aligned with spaces and nothing else."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title) if title else None, title_justify="left")
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    if title:
        print(title)
    lines = [list(columns), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def write_text(text: str) -> None:
    """Put ``text`` on standard output now, as UTF-8 whatever the locale, and nothing after it."""
    if not text:
        return
    sys.stdout.flush()
    raw = getattr(sys.stdout, "buffer", None)
    if raw is None:  # a replaced stream, as in a notebook
        sys.stdout.write(text)
    else:
        raw.write(text.encode("utf-8"))
        raw.flush()


class Progress:
    """What :func:`progress` gives: call it with the work done so far and a word on how it goes."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label = total, label
        self._started = self._last = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if done < self.total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        if done >= self.total and self._last == self._started:
            return  # over before the first line was due
        self._last = now
        share = 100 * done // max(self.total, 1)
        print(f"{self.label}: {share} %, {now - self._started:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """Show how far a piece of work of ``total`` units has come."""
    plain = Progress(total, label)
    if not sys.stderr.isatty():
        yield plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total, note="")

        class OnTerminal(Progress):
            def __call__(self, done: int, note: str = "") -> None:
                bar.update(task, completed=done, note=note)

        yield OnTerminal(total, label)
