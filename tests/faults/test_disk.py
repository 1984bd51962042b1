"""A full or read-only disk: one clean error, and the last good snapshot is what it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = str(Path(__file__).with_name("disk_child.py"))


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def check_full(found: dict[str, Any], reason: str) -> None:
    assert found["enough room"] == {"error": ["", ""], "newest_sound_step": 6, "half_written": []}
    kind, message = found["full"]["error"]
    assert kind == "SnapshotError"
    assert reason in message
    assert "step-000000" in message  # names the last good snapshot
    assert "\n" not in message
    assert found["full"]["newest_sound_step"] >= 6
    assert found["full"]["half_written"] == []
    assert found["room again"] == {"error": ["", ""], "newest_sound_step": 30, "half_written": []}


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """Simulates a full disk without any privilege; see ``disk_child``."""
    check_full(run([sys.executable, CHILD, "limit", str(tmp_path)]), "File too large")


def test_a_full_and_a_read_only_disk(tmp_path: Path) -> None:
    """The real thing on a tmpfs of one mebibyte, in a mount namespace that ends with the process."""
    inside = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none '{tmp_path}'"
    try:
        able = subprocess.run([*inside, mount], capture_output=True, timeout=30).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("this machine lets us mount nothing (needs the command unshare and user namespaces)")
    script = f"{mount} && exec '{sys.executable}' '{CHILD}' tmpfs '{tmp_path}'"
    found = run([*inside, script])
    check_full(found, "No space left")
    kind, message = found["read-only, resumed"]["error"]
    assert kind == "SnapshotError"
    assert "Read-only" in message
    assert found["read-only, resumed"]["newest_sound_step"] == found["full"]["newest_sound_step"]
    kind, message = found["read-only, new"]["error"]
    assert kind == "SnapshotError"
    assert "Read-only" in message
