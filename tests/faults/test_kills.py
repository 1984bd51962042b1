"""Ten kills on every run of the suite; ``python -m tests.faults.kill_loop --kills 100`` for more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 10


@pytest.mark.long
def test_killed_at_random_and_resumed_is_bit_for_bit_unbroken() -> None:
    command = [sys.executable, str(Path(__file__).with_name("kill_loop.py")), "--kills", str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    assert summary["differences"] == []
    assert done.returncode == 0
    assert summary["kills"] == KILLS
    assert summary["compared_values"] > 100
