"""What a run says about itself: ``metrics.jsonl``, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from statewise.errors import SnapshotError

__all__ = ["VOLATILE", "EventFile", "MetricsFile", "Record", "cut_metrics", "read_metrics"]

Record: TypeAlias = dict[str, Any]

#: The fields of a record that the clock decides; the others are the same in a broken and continued run.
VOLATILE = frozenset({"seconds", "tokens_per_second", "images_per_second"})


class MetricsFile:
    """Appends records, each with one write of a whole line; a write that fails half-way is taken back."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)

    def append(self, record: Record) -> None:
        """Raises OSError (disk full, ...); the file then ends as it did before."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written < len(line):  # a nearly full disk takes a part; the next write tells why
                os.write(self._descriptor, line[written:])
        except OSError:
            os.ftruncate(self._descriptor, before)
            raise

    def flush(self) -> None:
        """Put what was appended on the disk itself."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _whole_lines(path: Path) -> tuple[list[tuple[int, Record]], int]:
    """((offset behind the line, record) of each line, size of the file): a line without its end is no record."""
    content = path.read_bytes() if path.exists() else b""
    found, offset = [], 0
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        offset += len(line) + 1
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{path}: line {number} is not a record of a step: the file is damaged") from error
        if not isinstance(step, int):
            raise SnapshotError(f"{path}: line {number} has step {step!r}: the file is damaged")
        found.append((offset, record))
    return found, len(content)


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """All records, oldest first; one record a step. None where there is no file yet.

    Raises:
        SnapshotError: a line that is no record; names it.
    """
    return [record for _, record in _whole_lines(Path(path))[0]]


def cut_metrics(path: Path, step: int) -> None:
    """Remove a torn last line and what was recorded after ``step``: the run is about to record that again.

    Raises:
        SnapshotError: a line that is no record; names it.
    """
    lines, size = _whole_lines(path)
    end = max((offset for offset, record in lines if record["step"] <= step), default=0)
    if end < size:
        os.truncate(path, end)


class EventFile:
    """TensorBoard's event format, written without its background thread: an error appears where it happens.

    Args:
        directory: made if missing; every sitting writes a file of its own there.
        step: steps done before; what older files say about later steps is no longer shown.
    """

    def __init__(self, directory: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(directory / name, "wb", buffering=0)  # noqa: SIM115 - closed by close()
        self._records = RecordWriter(self._file)
        self._write(Event(file_version="brain.Event:2"))
        self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def append(self, record: Mapping[str, Any]) -> None:
        """Every number of a record but its step, under its own name."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._write(Event(step=record["step"], summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()
