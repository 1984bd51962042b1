"""What goes wrong with a file. Whatever a caller passed wrongly is a plain ``ValueError``."""

from __future__ import annotations

__all__ = ["FileError", "SnapshotError", "StateError", "WeightsError"]


class FileError(Exception):
    """A file cannot be used; the message names the file, the part of it, and the reason."""


class WeightsError(FileError):
    """A published checkpoint is unreadable, incomplete, mis-shaped or of no known architecture."""


class StateError(FileError):
    """A saved recurrent state is unreadable or belongs to another model."""


class SnapshotError(FileError):
    """A training snapshot is unreadable, damaged or belongs to another run."""
