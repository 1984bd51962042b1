"""``trainer.json`` of a snapshot: what a run was told and how far it came. Read as the file of a stranger."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from statewise.errors import SnapshotError

__all__ = ["FILE", "check_same_run", "read_record", "warn_of_other_threads"]

FILE = "trainer.json"


def read_record(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """The record in a snapshot's directory; ``kinds`` names what it must hold.

    Raises:
        SnapshotError: no such file, no JSON, or not these fields.
    """
    file = path / FILE
    try:
        record = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{file}: {error}") from error
    if not isinstance(record, dict):
        raise SnapshotError(f"{file}: holds a {type(record).__name__}, expected an object")
    for name, kind in kinds.items():
        if type(record.get(name)) is not kind:
            raise SnapshotError(f"{file}: {name} is {record.get(name)!r}, expected {kind.__name__}")
    return record


def check_same_run(
    path: Path, record: Mapping[str, Any], config: Any, resumable: tuple[str, ...], data: tuple[str, str, str]
) -> None:
    """Whether ``config`` may go on with the run that wrote ``record``.

    Args:
        path: the snapshot's directory.
        record: has ``config`` and ``step``.
        config: what is asked for now.
        resumable: fields that may differ.
        data: the record's field of the data's SHA-256, that of the data now, and what to call them.

    Raises:
        SnapshotError: the record's configuration is none.
        ValueError: another configuration, other data, or fewer steps than were done.
    """
    try:
        before = type(config).from_dict(record["config"])
    except ValueError as error:
        raise SnapshotError(f"{path / FILE}: {error}") from error
    run = path.parent.parent
    for spec in dataclasses.fields(config):
        was, now = getattr(before, spec.name), getattr(config, spec.name)
        if was != now and spec.name not in resumable:
            raise ValueError(
                f"{spec.name} is {now!r}, but the run in {run} has {was!r}; "
                f"only {', '.join(resumable)} may change on resume"
            )
    field, sha256, things = data
    if record[field] != sha256:
        raise ValueError(f"data {config.data!r} does not hold the {things} that the run in {run} began with")
    if config.steps < record["step"]:
        raise ValueError(f"steps is {config.steps}, but {path.name} has done {record['step']}; give that many or more")


def warn_of_other_threads(record: Mapping[str, Any]) -> None:
    """Say so if torch has another number of threads than the run began with."""
    if record["threads"] != torch.get_num_threads():
        warnings.warn(
            f"this run began with {record['threads']} threads and continues with {torch.get_num_threads()}: "
            "sums may be split differently, and the last bits of the result with them",
            stacklevel=4,
        )
