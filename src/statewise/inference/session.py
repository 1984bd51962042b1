"""A state file that can be carried on from: the state, and the one token it has not read yet."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

from statewise.errors import StateError
from statewise.files import atomic_write
from statewise.state import ModelState, load_state

__all__ = ["load_session", "save_session"]

_KEY = "pending_token"


def save_session(path: str | os.PathLike[str], state: ModelState, pending: int | None) -> None:
    """Write ``state`` as :meth:`ModelState.save` does, with ``pending`` added to the file's metadata.

    What was last sampled is not in a state (it would be needed to predict what comes after it), so a state alone
    cannot be carried on from. The file stays an ordinary state file: ``load_state`` reads it.

    Args:
        path: destination, written in one atomic step.
        state: has read everything but ``pending``.
        pending: the last token sampled; ``None`` when there is none.
    """

    def fill(temporary: Path) -> None:
        state.save(temporary)
        if pending is None:
            return
        content = temporary.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        header["__metadata__"][_KEY] = str(pending)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # safetensors keeps its tensors aligned to 8 bytes
        temporary.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    atomic_write(path, fill)


def load_session(path: str | os.PathLike[str]) -> tuple[ModelState, int | None]:
    """Read a state file and the token its state has not read, ``None`` when the file names none.

    Raises:
        StateError: as ``load_state``, or a pending token that is no id.
        FileNotFoundError: no such file.
    """
    state = load_state(path)
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        pending = json.loads(handle.read(length))["__metadata__"].get(_KEY)
    if pending is None:
        return state, None
    if not (isinstance(pending, str) and pending.isascii() and pending.isdecimal() and len(pending) < 10):
        raise StateError(f"{os.fspath(path)}: claims the pending token {pending!r}, which is no token id")
    return state, int(pending)
