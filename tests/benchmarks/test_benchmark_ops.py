"""The operators' benchmark: who is timed, who is not and why, and what is written down."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import ops as benchmark
from benchmarks import plot
from statewise.testing.memory import resident_peak
from statewise.testing.peers import Peer

PNG = b"\x89PNG\r\n"
OURS = Peer("statewise", "this commit", benchmark.ours("wkv4", "torch"))


def tiny(op: str, length: int) -> dict[str, Tensor]:
    k, v = torch.randn(2, 1, length, 4)
    inputs = {"k": k, "v": v, "log_w": -torch.rand(4), "u": torch.randn(4)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def measure(*peers: Peer, lengths: tuple[int, ...] = (8,), repeats: int = 3, cap: float = 60.0) -> list[dict[str, Any]]:
    return benchmark.measure("wkv4", [OURS, *peers], lengths, repeats, cap, tiny)


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """The first backward of a process imports for a second, whichever test comes first."""
    measure(repeats=1)


def wrong_output(inputs: Mapping[str, Tensor]) -> Tensor:
    return OURS.run(inputs) * 1.001


def wrong_gradient(inputs: Mapping[str, Tensor]) -> Tensor:
    y = OURS.run(inputs)
    return y.detach() + 1.01 * (y - y.detach())


def not_a_number(inputs: Mapping[str, Tensor]) -> Tensor:
    return OURS.run(inputs) * torch.nan


def broken(inputs: Mapping[str, Tensor]) -> Tensor:
    raise AssertionError("a multiple of 32")


@pytest.mark.parametrize("run", [wrong_output, wrong_gradient, not_a_number])
def test_what_differs_is_not_timed(run: Any) -> None:
    mine, theirs = measure(Peer("peer", "1", run))
    assert mine["runs"] == 3
    assert "both_ms" not in theirs
    assert theirs["skipped"].startswith("not timed: output differs")


def test_a_peer_that_fails_is_told_and_the_rest_goes_on() -> None:
    rows = measure(Peer("broken", "1", broken), Peer("fine", "1", OURS.run))
    assert rows[1]["skipped"] == "does not run: AssertionError: a multiple of 32"
    assert rows[2]["runs"] == 3


def test_our_own_fault_stops_the_run() -> None:
    with pytest.raises(AssertionError, match="multiple"):
        benchmark.measure("wkv4", [Peer("statewise", "", broken)], [8], 1, 60.0, tiny)


def test_a_slow_peer_is_left_out_of_longer_lengths() -> None:
    def slow(inputs: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.05)
        return OURS.run(inputs)

    rows = measure(Peer("slow", "1", slow), lengths=(8, 16, 64), cap=0.5, repeats=5)
    slow_rows = {row["T"]: row for row in rows if row["who"] == "slow"}
    assert slow_rows[8]["runs"] == 3  # after the first, which does not count
    assert slow_rows[8]["both_ms"] >= 50
    assert slow_rows[8]["forward_ms"] >= 50
    assert "the cap is 0 s" in slow_rows[64]["skipped"] or "the cap is 1 s" in slow_rows[64]["skipped"]
    assert all("both_ms" in row for row in rows if row["who"] == "statewise")


def test_what_takes_longer_than_the_cap_runs_once() -> None:
    def slow(inputs: Mapping[str, Tensor]) -> Tensor:
        time.sleep(0.05)
        return OURS.run(inputs)

    rows = measure(Peer("slow", "1", slow), lengths=(8,), cap=0.04)
    assert [row["runs"] for row in rows if row["who"] == "slow"] == [1]


def test_our_loop_stops_at_its_longest() -> None:
    reference = Peer(benchmark.REFERENCE, "", OURS.run)
    rows = measure(reference, lengths=(benchmark.LONGEST_REFERENCE, benchmark.LONGEST_REFERENCE + 1), repeats=1)
    mine = [row for row in rows if row["who"] == benchmark.REFERENCE]
    assert "both_ms" in mine[0]
    assert "skipped" in mine[1]


def test_growth_is_the_exponent_of_time() -> None:
    rows = [
        {"op": "wkv4", "who": who, "T": length, "both_ms": 3.0 * length**power}
        for who, power in (("linear", 1), ("quadratic", 2))
        for length in (128, 256, 512)
    ]
    rows.append({"op": "wkv4", "who": "once", "T": 128, "both_ms": 1.0})
    rows.append({"op": "wkv4", "who": "quadratic", "T": 1024, "skipped": "too slow"})
    assert [(e["who"], e["exponent"], e["exponent_last"], e["to_T"]) for e in benchmark.growth(rows)] == [
        ("linear", 1.0, 1.0, 512),
        ("quadratic", 2.0, 2.0, 512),
    ]


def test_peak_memory_sees_a_tensor_come_and_go() -> None:
    before = resident_peak(reset=True)
    if before is None:
        pytest.skip("this system does not tell the peak of memory")
    torch.ones(16 << 20)
    peak = resident_peak(reset=False)
    assert peak is not None
    assert peak - before > 60 << 20
    after = resident_peak(reset=True)
    assert after is not None
    assert after < before + (32 << 20)


@pytest.fixture
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script, at sizes for a test."""
    draw = benchmark.draw
    # channels or heads: four are enough
    many = {"wkv4": 512, "bi_wkv": 192, "token_mix": 512, "ssd": 24, "selective_scan": 1536, "causal_conv1d": 1536}
    many |= dict.fromkeys(("wkv6", "wkv6-constant", "wkv6-head", "wkv7"), 8)

    def fewer(op: str, length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        cut = {}
        for name, x in draw(op, length, dtype).items():
            axes = [axis for axis, size in enumerate(x.shape) if size == many[op]]
            cut[name] = (x.detach().narrow(axes[0], 0, 4) if axes else x.detach()).clone().requires_grad_()
        return cut

    measure = benchmark.measure
    monkeypatch.setattr(benchmark, "measure", lambda *a, **k: measure(*a, inputs_of=fewer, **k))


@pytest.mark.usefixtures("small_shapes")
def test_a_run_writes_its_table_and_its_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "find_peers", lambda op: ([], {"peer of " + op: "not installed"}))
    out = tmp_path / "ops.json"
    try:
        benchmark.main(["--lengths", "16,4,9", "--repeats", "1", "--threads", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    document = json.loads(out.read_text())
    assert document["complete"] is True
    assert {row["op"] for row in document["rows"]} == set(benchmark.SHAPES)
    assert [row["T"] for row in document["rows"] if row["op"] == "wkv7" and row["who"] == "statewise torch"] == [
        4,
        9,
        16,
    ]
    assert all(row["output_difference"] < 1e-5 for row in document["rows"])
    assert all(0 <= row["both_of_bandwidth"] < 2 for row in document["rows"])  # tiny inputs lie in cache
    assert document["absent"]["peer of wkv4"] == "not installed"
    assert document["absent"]["RWKV-LM loop"].startswith("no checkout")
    assert document["machine"]["threads"] == 1
    assert out.with_suffix(".png").read_bytes().startswith(PNG)

    printed = capsys.readouterr().out
    assert "| statewise torch | " in printed
    plot.main([str(out), "--plot", str(tmp_path / "again.png")])
    assert capsys.readouterr().out in printed
    assert (tmp_path / "again.png").read_bytes().startswith(PNG)


@pytest.mark.usefixtures("small_shapes")
def test_what_was_measured_before_a_break_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(op: str) -> Any:
        if op == "wkv7":
            raise KeyboardInterrupt
        return [], {}

    threads = torch.get_num_threads()
    monkeypatch.setattr(benchmark, "find_peers", stop)
    out = tmp_path / "ops.json"
    try:
        with pytest.raises(KeyboardInterrupt):
            benchmark.main(["--lengths", "4", "--repeats", "1", "--threads", "1", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    document = json.loads(out.read_text())
    assert document["complete"] is False
    assert {row["op"] for row in document["rows"]} == {"wkv4", "wkv6", "wkv6-constant", "wkv6-head"}


def test_the_table_tells_times_growth_and_gaps() -> None:
    fast = {"op": "wkv4", "shape": "B4 C512", "who": "statewise"}
    rows = [
        {**fast, "T": 128, "forward_ms": 0.5, "both_ms": 2.0, "peak_mib": 3},
        {**fast, "T": 256, "forward_ms": 1.04, "both_ms": 412.3, "peak_mib": 7},
        {**fast, "who": "peer", "T": 128, "skipped": "not timed"},
    ]
    growth = [{"op": "wkv4", "who": "statewise", "exponent": 1.02}]
    lines = plot.growth_table({"rows": rows, "growth": growth, "dtype": "float32"}).splitlines()
    assert lines[2] == "|  | T = 128 | T = 256 | growth | memory |"
    assert lines[4] == "| statewise | 0.50 / 2.0 | 1.0 / 412 | T^1.02 | 7 MiB at 256 |"
    assert lines[5] == "| peer | – | – | – | – |"


@pytest.mark.parametrize(
    "arguments",
    [["--ops", "wkv5"], ["--peers", "nobody"], ["--lengths", "12,x"], ["--lengths", "0"], ["--repeats", "0"]],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err
