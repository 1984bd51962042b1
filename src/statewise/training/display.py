"""What a person sees of a run: a bar on a terminal, a line a record off one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

__all__ = ["Display", "describe", "duration"]


def duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def describe(report: Mapping[str, Any]) -> str:
    """One line: ``step 20/300 · loss 2.513 · 3.626 bits/byte · 10,240 tokens/s · ETA 0:14``."""
    parts = [
        f"step {report['step']}/{report['steps']}",
        f"loss {report['loss']:.3f}",
        f"{report['bits_per_byte']:.3f} bits/byte",
        f"{report['tokens_per_second']:,.0f} tokens/s",
        f"ETA {duration(report['eta_seconds'])}",
    ]
    if "valid_bits_per_byte" in report:
        parts.insert(3, f"validation {report['valid_bits_per_byte']:.3f}")
    return " · ".join(parts)


class Display:
    """Shows reports as they come. Call it with each, and ``close`` it.

    Args:
        stream: ``None``: standard error, which leaves standard output to results.
        line: makes the line of a report.
    """

    def __init__(self, stream: TextIO | None = None, line: Callable[[Mapping[str, Any]], str] = describe) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._line = line
        self._bar: Any = None

    def __call__(self, report: Mapping[str, Any]) -> None:
        if not self._stream.isatty():
            print(self._line(report), file=self._stream, flush=True)
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            # No refreshing thread: the bar moves when there is something to say.
            self._bar = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.description}", markup=False),
                console=Console(file=self._stream),
                auto_refresh=False,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=report["steps"])
        self._bar.update(self._task, completed=report["step"], description=self._line(report), refresh=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
