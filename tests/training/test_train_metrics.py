"""metrics.jsonl is never torn, TensorBoard reads our events, and the picture is a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statewise.errors import SnapshotError
from statewise.training.display import Display, describe
from statewise.training.metrics import EventFile, MetricsFile, cut_metrics, read_metrics
from statewise.training.plot import draw_curve

REPORT = {"step": 20, "steps": 300, "loss": 2.5131, "bits_per_byte": 3.6256}
REPORT |= {"tokens_per_second": 10240.2, "eta_seconds": 3671.0}


@given(cut=st.integers(0, 200), step=st.integers(0, 7))
def test_cutting_at_any_byte(tmp_path_factory: pytest.TempPathFactory, cut: int, step: int) -> None:
    """However much of the last writes survived, what stays is whole records up to the step."""
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        for number in range(1, 7):
            metrics.append({"step": number, "loss": number / 3})
    whole = path.read_bytes()
    survived = whole[: max(0, len(whole) - cut)]
    path.write_bytes(survived)
    cut_metrics(path, step)
    lines = survived.split(b"\n")[:-1]
    assert path.read_bytes() == b"".join(line + b"\n" for line in lines if json.loads(line)["step"] <= step)
    with MetricsFile(path) as metrics:
        metrics.append({"step": 9, "loss": 0.1})
    assert read_metrics(path)[-1] == {"step": 9, "loss": 0.1}


@pytest.mark.parametrize("line", [b"{", b"[1]", b"{}", b'{"step": "x"}', b"\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(SnapshotError, match=r"metrics\.jsonl: line 2"):
        cut_metrics(path, 1)
    assert path.read_bytes().count(b"\n") == 3


def test_nothing_is_no_records(tmp_path: Path) -> None:
    cut_metrics(tmp_path / "metrics.jsonl", 3)
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_write_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated: the disk takes seven bytes of a line and is full then."""
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.append({"step": 1})
        real, calls = os.write, []

        def short(descriptor: int, data: bytes) -> int:
            calls.append(data)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return real(descriptor, data[:7])

        monkeypatch.setattr(os, "write", short)
        with pytest.raises(OSError, match="No space left"):
            metrics.append({"step": 2})
        monkeypatch.undo()
        metrics.append({"step": 3})
    assert [record["step"] for record in read_metrics(path)] == [1, 3]


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics, pytest.raises(ValueError, match="JSON"):
        metrics.append({"step": 1, "loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_tensorboard_reads_our_events(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, steps in ((0, (1, 2, 3, 4)), (2, (3, 4))):  # the second sitting continues from step 2
        events = EventFile(tmp_path / "tensorboard", first)
        for step in steps:
            events.append({"step": step, "loss": step + first / 10, "seconds": 1.0})
        events.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert reader.Tags()["scalars"] == ["loss", "seconds"]
    assert [(e.step, round(e.value, 3)) for e in reader.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2)]


def test_the_curve(tmp_path: Path) -> None:
    draw_curve([], tmp_path / "loss.png", "nothing")
    assert list(tmp_path.iterdir()) == []
    records: list[dict[str, Any]] = [{"step": s, "bits_per_byte": 8 / s} for s in range(1, 9)]
    draw_curve(records, tmp_path / "loss.png", "a $ run")
    plain = (tmp_path / "loss.png").read_bytes()
    assert plain.startswith(b"\x89PNG")
    assert plain.endswith(b"IEND\xaeB`\x82")
    records[3]["valid_bits_per_byte"] = 3.0
    draw_curve(records, tmp_path / "loss.png", "a $ run")
    assert (tmp_path / "loss.png").read_bytes() != plain
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_a_line_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert describe(REPORT) == "step 20/300 · loss 2.513 · 3.626 bits/byte · 10,240 tokens/s · ETA 1:01:11"
    assert "· validation 3.100 ·" in describe({**REPORT, "valid_bits_per_byte": 3.1})
    display = Display()
    display(REPORT)
    display.close()
    captured = capsys.readouterr()
    assert captured.err == describe(REPORT) + "\n"
    assert captured.out == ""


def test_a_bar_on_a_terminal() -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    display = Display(stream)
    display(REPORT)
    display.close()
    assert "ETA 1:01:11" in stream.getvalue()
    assert "\x1b[" in stream.getvalue()
