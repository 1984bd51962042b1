"""Files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from statewise.files import atomic_write, sweep


def test_writes_bytes_text_and_by_function(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write(path, lambda temporary: temporary.write_text("made"))  # type: ignore[arg-type, return-value]
    assert path.read_text() == "made"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        atomic_write(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_sweep_removes_only_what_killed_writers_left(tmp_path: Path) -> None:
    mine = [tmp_path / "model.safetensors", tmp_path / ".hidden", tmp_path / "notes.statewise-tmp"]
    for path in mine:
        path.write_text("keep")
    stray = tmp_path / ".model.safetensors.ab12_x9z.statewise-tmp"
    stray.write_text("half")
    assert sweep(tmp_path) == [stray]
    assert sorted(tmp_path.iterdir()) == sorted(mine)


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "no" / "file", b"")
