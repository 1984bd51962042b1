"""Snapshots: whole or not there, checked from end to end, and never passed over when damaged."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from statewise.errors import SnapshotError
from statewise.training import latest_snapshot
from statewise.training.snapshot import list_snapshots, sweep_run, verify_snapshot, write_snapshot


def fill(folder: Path) -> None:
    (folder / "a.json").write_text('{"a": 1}\n')
    (folder / "b.bin").write_bytes(random.Random(1).randbytes(5000))
    (folder / "empty").write_bytes(b"")


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    return write_snapshot(tmp_path, 1000, fill, keep=2)


def test_a_snapshot_is_found_and_sound(tmp_path: Path, snapshot: Path) -> None:
    assert snapshot == tmp_path / "snapshots" / "step-00001000" == latest_snapshot(tmp_path)
    assert verify_snapshot(snapshot) == 1000
    assert sorted(path.name for path in snapshot.iterdir()) == ["a.json", "b.bin", "empty", "manifest.json"]
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00001000"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 30, 100_000_000, 200):
        write_snapshot(tmp_path, step, fill, keep=2)
    assert [step for step, _ in list_snapshots(tmp_path)] == [200, 100_000_000]
    assert latest_snapshot(tmp_path) == tmp_path / "snapshots" / "step-100000000"
    assert latest_snapshot(tmp_path / "nowhere") is None


def test_every_flipped_bit_is_seen(snapshot: Path) -> None:
    chance = random.Random(0)
    files = sorted(path for path in snapshot.iterdir() if path.stat().st_size)
    for _ in range(200):
        path = chance.choice(files)
        content = path.read_bytes()
        bit = chance.randrange(8 * len(content))
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match=path.name):
            verify_snapshot(snapshot)
        path.write_bytes(content)
    verify_snapshot(snapshot)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda p: (p / "b.bin").unlink(), r"b\.bin: cannot be read: No such file.*incomplete"),
        (lambda p: (p / "b.bin").write_bytes(b""), r"b\.bin: 0 bytes, the manifest says 5000"),
        (lambda p: (p / "b.bin").write_bytes((p / "b.bin").read_bytes() + b"x"), r"b\.bin: 5001 bytes"),
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json: cannot be read: .*: not a whole snapshot"),
        (lambda p: (p / "manifest.json").write_bytes(b""), r"manifest\.json: does not match its own"),
        (lambda p: (p / "manifest.json").write_bytes(b"[" * 200_000), r"manifest\.json: does not match its own"),
        (lambda p: (p / "manifest.json").write_bytes(b"[1]"), r"manifest\.json: does not match its own"),
        (lambda p: (p / "manifest.json").write_bytes(b" " * (1 << 21)), r"manifest\.json: larger than"),
        (
            lambda p: (p / "manifest.json").write_text(json.dumps(json.loads((p / "manifest.json").read_text()))),
            r"manifest\.json: does not match its own",
        ),
    ],
)
def test_damage_is_named(snapshot: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(snapshot)
    with pytest.raises(SnapshotError, match=says):
        verify_snapshot(snapshot)


def test_a_renamed_snapshot_is_refused(tmp_path: Path, snapshot: Path) -> None:
    shutil.copytree(snapshot, tmp_path / "snapshots" / "step-00002000")
    with pytest.raises(SnapshotError, match="manifest is of step 1000"):
        verify_snapshot(tmp_path / "snapshots" / "step-00002000")


@pytest.mark.parametrize("body", [{"files": {"../b": {"bytes": 0, "sha256": ""}}}, {"files": []}, {"step": "1"}])
def test_a_forged_manifest_cannot_point_elsewhere(snapshot: Path, body: dict[str, object]) -> None:
    from statewise.training import snapshot as module

    honest = {"format": "statewise-snapshot", "version": 1, "step": 1000, "files": {}}
    (snapshot / "manifest.json").write_bytes(module._manifest({**honest, **body}))
    with pytest.raises(SnapshotError, match="does not list files"):
        verify_snapshot(snapshot)
    (snapshot / "manifest.json").write_bytes(module._manifest({**honest, "version": 2}))
    with pytest.raises(SnapshotError, match="version 2; this release reads"):
        verify_snapshot(snapshot)


def test_a_failed_write_leaves_what_was(tmp_path: Path, snapshot: Path) -> None:
    def full(folder: Path) -> None:
        (folder / "part").write_bytes(b"x" * 100)
        raise OSError(28, "No space left on device")

    with pytest.raises(SnapshotError, match=r"step-00001001: .*No space left.*last good one is .*step-00001000"):
        write_snapshot(tmp_path, 1001, full, keep=1)
    with pytest.raises(SnapshotError, match="step-00001000: cannot write"):
        write_snapshot(tmp_path, 1000, fill, keep=1)
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["step-00001000"]
    verify_snapshot(snapshot)


def test_sweeping_takes_temporaries_and_nothing_else(tmp_path: Path, snapshot: Path) -> None:
    folder = snapshot.parent
    for name in (".step-00001001.x.statewise-tmp", ".step-00000900.old.statewise-tmp"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "tokens").mkdir()
    stale = [tmp_path / ".loss.png.abc.statewise-tmp", tmp_path / "tokens" / ".a.npy.abc.statewise-tmp"]
    mine = [tmp_path / "notes.txt", tmp_path / ".hidden", folder / "step-1"]
    for path in stale + mine:
        path.write_bytes(b"")
    sweep_run(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00001000", "step-1"]
    assert all(path.exists() for path in mine)
    assert not any(path.exists() for path in stale)
    assert latest_snapshot(tmp_path) == snapshot
