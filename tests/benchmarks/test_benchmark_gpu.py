"""The GPU benchmarks without a GPU: what is drawn, judged, timed, written and shown.

Adapters are held to their peers' conventions by stand-ins, which compute by our own reference what
the published kernels say they compute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu as benchmark
from benchmarks import gpu_machine, gpu_memcheck, gpu_models, gpu_peers, plot
from benchmarks.gpu_cases import CASES, GpuCase
from statewise import ops

PNG = b"\x89PNG\r\n"
CPU = torch.device("cpu")
CONV = next(case for case in CASES if case.op == "causal_conv1d")
WKV7 = GpuCase("wkv7", 2, 32, {"H": 2, "K": 16, "V": 16}, {k: "B T H K" for k in ("r", "log_w", "k", "v", "a", "b")})
WKV6 = GpuCase(
    "wkv6",
    2,
    20,
    {"H": 2, "K": 16, "V": 16},
    {"r": "B T H K", "log_w": "B T H K", "k": "B T H K", "v": "B T H V", "u": "H K"},
    wide=("u",),
)
WKV4 = GpuCase("wkv4", 2, 20, {"C": 8}, {"k": "B T C", "v": "B T C", "log_w": "C", "u": "C"}, wide=("log_w", "u"))
BI_WKV = dataclasses.replace(WKV4, op="bi_wkv")
SCAN = GpuCase(
    "selective_scan",
    2,
    20,
    {"C": 6, "N": 4},
    {"x": "B T C", "dt": "B T C", "A": "C N", "B": "B T N", "C": "B T N", "D": "C", "z": "B T C", "dt_bias": "C"},
    wide=("A", "D", "dt_bias"),
    options={"dt_softplus": True},
)
SSD = GpuCase(
    "ssd",
    2,
    20,
    {"H": 2, "P": 4, "G": 1, "N": 6},
    {"x": "B T H P", "dt": "B T H", "A": "H", "B": "B T G N", "C": "B T G N", "D": "H"},
    wide=("dt", "A", "D"),
)
MAMBA3 = GpuCase(
    "mamba3",
    2,
    20,
    {"H": 2, "P": 4, "G": 1, "N": 6, "S": 2},
    {
        **{"C": "B T G N", "B": "B T G N", "x": "B T H P", "log_decay": "B T H", "dt": "B T H", "trap": "B T H"},
        **{"angles": "B T H S", "C_bias": "H N", "B_bias": "H N", "D": "H", "z": "B T H P"},
    },
    wide=("log_decay", "dt", "C_bias", "B_bias", "D"),
)
ROW_FIELDS = {"op", "B", "T", "who", "version", "peak_bytes", "forward_ms", "forward_ms_range", "both_ms", "rounds"}


class Ticks:
    """A clock that runs what it times and tells what it is told to."""

    def __init__(self) -> None:
        self.calls = 0

    def milliseconds(self, call: Any) -> float:
        call()
        self.calls += 1
        return float(self.calls)

    def peak(self, call: Any) -> int:
        call()
        return 7


def plain(case: GpuCase) -> gpu_peers.GpuPeer:
    """Our own form in torch, under another name."""
    ours = next(peer for peer in benchmark.our_peers(case) if peer.name == "statewise torch")
    return ours._replace(name="peer")


def errors(case: GpuCase, peer: gpu_peers.GpuPeer, dtype: torch.dtype = torch.float64) -> dict[str, float]:
    inputs = benchmark.draw(case, dtype, CPU)
    return benchmark.judge(case, peer, benchmark.truth_of(case, inputs), inputs)


# ---------------------------------------------------------------------------------------------------- shapes and draws


def test_scaling_keeps_the_tokens() -> None:
    assert [(benchmark.scaled(WKV7, t).batch, t) for t in (8, 16, 64, 1000)] == [(8, 8), (4, 16), (1, 64), (1, 1000)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
@pytest.mark.parametrize("alike", [False, True])
def test_every_case_can_be_drawn_and_judged(case: GpuCase, alike: bool) -> None:
    small = benchmark.toy(case)
    inputs = benchmark.draw(small, torch.bfloat16, CPU, alike=alike)
    wanted = small.arguments(torch.empty, torch.bfloat16, "meta")
    assert {n: (x.shape, x.dtype) for n, x in inputs.items()} == {n: (x.shape, x.dtype) for n, x in wanted.items()}
    truth = benchmark.truth_of(small, inputs)
    assert all(bool(x.isfinite().all()) for x in truth.values())
    found = benchmark.judge(small, plain(small), truth, inputs)
    assert set(found) == {"y", *(f"d_{name}" for name in inputs)}
    assert all(gap < 0.02 for gap in found.values()), found


def test_drawn_decays_and_keys_lie_where_trained_ones_do() -> None:
    x = benchmark.draw(WKV7, torch.bfloat16, CPU)
    assert -0.6065306597 < float(x["log_w"].min()) < float(x["log_w"].max()) < 0
    assert torch.allclose(x["a"].float().norm(dim=-1), torch.ones(2, 32, 2), atol=1e-2)
    assert float(benchmark.draw(SCAN, torch.float32, CPU)["A"].max()) < 0
    assert float(benchmark.draw(SSD, torch.float32, CPU)["dt"].min()) > 0

    def likeness(x: Mapping[str, Tensor]) -> float:
        keys = x["k"].double().flatten(0, 1).transpose(0, 1)
        return float(torch.nn.functional.cosine_similarity(keys[:, :1], keys[:, 1:], dim=-1).mean())

    assert likeness(benchmark.draw(WKV7, torch.float32, CPU, alike=True)) > 0.9 > 0.3 > likeness(x)


def test_cases_of_one_label_are_told_apart() -> None:
    titles = [case.label + benchmark.particulars(case) for case in CASES]
    assert len(set(titles)) == len(titles)
    wkv6 = [benchmark.particulars(case) for case in CASES if case.op == "wkv6"]
    assert wkv6[:2] == [", log_w (B, T, H, K)", ", log_w (H, K)"]


def test_least_work_and_least_bytes() -> None:
    forward, both = benchmark.recurrence_flops(WKV7)
    assert (forward, both) == (2 * 64 * 2 * 4 * 256, 3 * 2 * 64 * 2 * 4 * 256)
    assert benchmark.recurrence_flops(SCAN)[0] == 2 * 40 * 3 * 6 * 4
    wide = dataclasses.replace(WKV7, floor=(7, 22))
    assert benchmark.least_bytes(wide, torch.bfloat16) == (7 * 4096, 22 * 4096)
    assert benchmark.least_bytes(wide, torch.float32) == (7 * 8192, 22 * 8192)


def test_bytes_are_counted_from_the_launches() -> None:
    case = dataclasses.replace(CONV, batch=1, time=128)
    moved = benchmark.moved_bytes(case, torch.bfloat16)
    assert moved is not None
    x = 128 * 4096 * 2
    assert 2 * x <= moved[0] < 3 * x
    assert moved[0] < moved[1]


# ---------------------------------------------------------------------------------------------------- who is timed


def test_what_is_wrong_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    good = plain(WKV6)
    peers = [
        good._replace(name="good"),
        good._replace(name="twice", finish=lambda y: 2 * y),
        good._replace(name="nan", finish=lambda y: y * math.nan),
        good._replace(name="broken", run=lambda x: 1 / 0),
        good._replace(name="statewise triton", finish=lambda y: 1.2 * y),
    ]
    found = benchmark.errors_of(WKV6, peers, torch.float32, CPU, 20)
    assert set(found["good"]) == {"random", "alike"}
    assert found["broken"] == {"failed": "ZeroDivisionError: division by zero"}
    fit, faults = benchmark._fit(WKV6, peers, found)
    assert [peer.name for peer in fit] == ["good"]
    assert len(faults) == 1
    assert faults[0].startswith(f"{WKV6.label}: ")
    assert "differs from float64 by" in faults[0]
    told = capsys.readouterr().out
    assert all(f"{name}: not timed" in told for name in ("twice", "nan", "broken", "statewise triton"))


def test_rows_have_medians_fractions_and_reasons() -> None:
    case = dataclasses.replace(WKV6, floor=(5, 14))
    slow = plain(case)._replace(name="statewise torch")

    def refuse(inputs: Any) -> Any:
        raise ValueError("T is a multiple of 16")

    yardstick = benchmark.attention(case)
    assert yardstick is not None
    contestants = [slow, slow._replace(name="peer", run=refuse), yardstick]
    rates = {"bytes": 1e12, "flops": 1e14}
    mine, theirs, attention = benchmark.measure(case, contestants, torch.float32, CPU, Ticks(), rates, (2, 3))
    assert set(mine) >= ROW_FIELDS
    assert (mine["B"], mine["T"], mine["who"], mine["peak_bytes"]) == (2, 20, "statewise torch", 7)
    assert mine["forward_ms_range"][0] <= mine["forward_ms"] <= mine["forward_ms_range"][1]
    least = benchmark.least_bytes(case, torch.float32)[1]
    assert mine["both_of_floor"] == round(least / 1e12 / (mine["both_ms"] / 1e3), 3)
    assert mine["both_floor_ms"] == round(least / 1e9, 4)
    assert "both_of_bandwidth" not in mine  # nothing of ours was launched
    assert theirs["skipped"] == "ValueError: T is a multiple of 16"
    assert "both_of_floor" not in attention
    assert attention["rounds"] == 3
    (long,) = benchmark.measure(
        dataclasses.replace(case, batch=1, time=5000), [slow], torch.float32, CPU, Ticks(), rates, (1, 1)
    )
    assert long["skipped"] == "plain torch is timed up to T = 4096"


def test_a_fault_of_ours_is_no_limit() -> None:
    def fail(inputs: Any) -> Any:
        raise RuntimeError("an illegal memory access")

    ours = plain(WKV6)._replace(name="statewise triton", run=fail)
    with pytest.raises(RuntimeError, match="illegal"):
        benchmark.measure(WKV6, [ours], torch.float32, CPU, Ticks(), {"bytes": 1.0, "flops": 1.0}, (1, 1))


def test_attention_has_the_heads_of_the_case() -> None:
    for case, shape in ((WKV7, (2, 2, 32, 16)), (SSD, (2, 2, 20, 4)), (WKV4, (2, 1, 20, 8))):
        peer = benchmark.attention(case)
        assert peer is not None
        given = peer.prepare(benchmark.draw(case, torch.float32, CPU))
        assert peer.run(given).shape == shape
    assert benchmark.attention(CONV) is None


# ---------------------------------------------------------------------------------------------------- the command


def test_the_command_line_is_checked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = benchmark.parse(["--rehearse", "--ops", "causal_conv1d", "--lengths", "64,16", "--peers", "a,b"])
    assert (options.ops, options.lengths, options.peers) == (("causal_conv1d",), (16, 64), ("a", "b"))
    refused = [
        (["--rehearse", "--ops", "wkv9"], "'wkv9'"),
        (["--rehearse", "--lengths", "x"], "--lengths"),
        (["--rehearse", "--lengths", "0"], "1 or more"),
    ]
    for arguments, message in refused:
        with pytest.raises(SystemExit) as stop:
            benchmark.parse(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    for module in (benchmark, gpu_models):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            module.parse([])
        assert "no CUDA device" in capsys.readouterr().err
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(SystemExit):
            module.parse(["--rehearse"])
        assert "TRITON_INTERPRET=1" in capsys.readouterr().err
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        gpu_models.parse(["--rehearse", "--models", "GPT"])
    assert "RWKV-7 0.4B" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_a_rehearsal_measures_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "gpu.json"
    assert benchmark.main(["--rehearse", "--ops", "causal_conv1d", "--out", str(out)]) == 0
    document = json.loads(out.read_text("utf-8"))
    assert document["kind"] == "gpu ops"
    assert document["rehearsal"] is document["complete"] is True
    assert document["copy_bytes_per_second"] > 0 < document["matmul_flops_per_second"]
    (case,) = document["cases"]
    assert "No module named" in case["absent"]["causal-conv1d (B,T,C)"]
    assert {row["T"] for row in case["rows"]} == {12, 24}
    assert {row["who"] for row in case["rows"]} >= {"statewise triton", "statewise torch", "torch conv1d"}
    mine = next(row for row in case["rows"] if row["who"] == "statewise triton")
    assert set(mine) >= ROW_FIELDS | {"forward_bytes", "both_of_bandwidth"}
    assert case["errors"]["statewise triton"]["random"]["y"] < 0.003
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    table = capsys.readouterr().out
    assert "| statewise triton |" in table
    assert "A rehearsal on a CPU" in table
    out.with_suffix(".png").unlink()
    plot.main([str(out)])
    assert out.with_suffix(".png").exists()
    assert capsys.readouterr().out.strip() in table
    assert benchmark.main(["--rehearse", "--ops", "causal_conv1d", "--out", str(out), "--minutes", "0"]) == 0
    document = json.loads(out.read_text("utf-8"))
    assert not document["complete"]
    assert len(document["left_out"]) == 1


def test_a_fault_ends_in_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wrong = plain(CONV)._replace(name="statewise triton", finish=lambda y: 2 * y)
    monkeypatch.setattr(benchmark, "our_peers", lambda case: [wrong])
    out = tmp_path / "gpu.json"
    assert benchmark.main(["--rehearse", "--ops", "causal_conv1d", "--peers", "none", "--out", str(out)]) == 1
    assert "differs from float64" in json.loads(out.read_text("utf-8"))["faults"][0]


def test_the_table_of_a_real_run() -> None:
    row = {"B": 8, "T": 4096, "peak_bytes": 3 << 20, "forward_ms": 0.523, "both_ms": 1.7, "rounds": 50}
    rows = [
        {**row, "who": "statewise triton", "forward_of_floor": 0.41, "both_of_floor": 0.39, "both_of_matmul": 0.1}
        | {"forward_of_bandwidth": 0.8, "both_of_bandwidth": 0.75},
        {**row, "who": "fla chunk", "both_ms": 5.9},
        {**row, "who": "fla chunk", "B": 1, "T": 32768, "skipped": "OutOfMemoryError: 80 GiB"},
    ]
    del rows[2]["both_ms"]
    document = {
        "dtype": "bfloat16",
        "rehearsal": False,
        "machine": {"accelerator": {"name": "NVIDIA H200", "device": "cuda"}},
        "copy_bytes_per_second": 4.3e12,
        "matmul_flops_per_second": 7.9e14,
        "cases": [
            {
                "label": "wkv7 B8 T4096 H32",
                "own": [8, 4096],
                "absent": {"RWKV-LM": "no checkout given (--rwkv-lm)"},
                "errors": {"statewise triton": {"random": {"y": 0.0021, "d_k": 0.0034}, "alike": {"y": 0.0042}}},
                "rows": rows,
            }
        ],
        "faults": [],
        "left_out": ["ssd B8 T4096"],
    }
    table = plot.gpu_table(document)
    assert "NVIDIA H200, bfloat16: copies 4.30 TB/s, matrix products 790 TFLOP/s" in table
    expected = "| statewise triton | 0.52 | 1.7 | 0.41 / 0.39 | 0.80 / 0.75 | – / 0.10 | 3 | 2.1e-03 | 3.4e-03 (d_k) |"
    assert expected + " 4.2e-03 |" in table
    assert "| fla chunk | 0.52 / 5.9 | – |" in table
    assert "RWKV-LM: no checkout given (--rwkv-lm); fla chunk at T = 32768: OutOfMemoryError: 80 GiB." in table
    assert "Left out, for want of time: ssd B8 T4096" in table


# ---------------------------------------------------------------------------------------------------- adapters


def fake(monkeypatch: pytest.MonkeyPatch, version_of: str, path: str, **names: Any) -> None:
    """A package that holds ``names`` in the module ``path``."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    for name, value in names.items():
        setattr(sys.modules[path], name, value)
    monkeypatch.setattr(gpu_peers.metadata, "version", lambda package: f"{package} 9")


def only(case: GpuCase, name: str, **checkouts: Path) -> gpu_peers.GpuPeer:
    found, absent = gpu_peers.find_gpu_peers(case, checkouts, (name,))
    assert not absent
    return found[0]


def test_fla_takes_log_decays_and_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_rwkv7(r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, *, scale: float, **rest: Any) -> Any:
        assert scale == 1.0
        return ops.wkv7(r, w, k, v, a, b, backend="reference")[0], None

    fake(monkeypatch, "fla-core", "fla.ops.rwkv7", chunk_rwkv7=chunk_rwkv7)
    peer = only(WKV7, "fla chunk, bounded")
    assert peer.version == "fla-core 9"
    assert max(errors(WKV7, peer).values()) < 1e-10


@pytest.mark.parametrize("constant", [False, True])
def test_fla_has_no_constant_decay(monkeypatch: pytest.MonkeyPatch, constant: bool) -> None:
    def chunk_rwkv6(r: Any, k: Any, v: Any, w: Any, u: Any, *, scale: float) -> Any:
        assert w.shape == k.shape
        return ops.wkv6(r, w, k, v, u, backend="reference")[0] * scale, None

    fake(monkeypatch, "fla-core", "fla.ops")
    fake(monkeypatch, "fla-core", "fla.ops.rwkv6", chunk_rwkv6=chunk_rwkv6)
    sys.modules["fla.ops"].rwkv6 = sys.modules["fla.ops.rwkv6"]  # type: ignore[attr-defined]
    case = dataclasses.replace(WKV6, shapes={**WKV6.shapes, "log_w": "H K"}) if constant else WKV6
    assert max(errors(case, only(case, "fla chunk")).values()) < 1e-10


def test_fla_takes_the_stored_decay_of_rwkv4(monkeypatch: pytest.MonkeyPatch) -> None:
    def fused_recurrent_rwkv4(w: Any, u: Any, k: Any, v: Any, state: Any) -> Any:
        assert state.shape == (2, 3, 1, 8)
        assert float(state[:, 2].max()) == pytest.approx(-1e38)
        return ops.wkv4(k, v, -torch.exp(w), u, backend="reference")[0], state

    fake(monkeypatch, "fla-core", "fla.ops.rwkv4", fused_recurrent_rwkv4=fused_recurrent_rwkv4)
    assert max(errors(WKV4, only(WKV4, "fla fused_recurrent")).values()) < 1e-10


def test_mamba_has_time_last(monkeypatch: pytest.MonkeyPatch) -> None:
    def selective_scan_fn(
        u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, delta_bias: Any, delta_softplus: bool
    ) -> Any:
        assert u.is_contiguous()
        x, dt, B, C, z = (value.transpose(1, 2) for value in (u, delta, B, C, z))
        y, _ = ops.selective_scan(x, dt, A, B, C, D, z, dt_bias=delta_bias, dt_softplus=delta_softplus)
        return y.transpose(1, 2)

    fake(monkeypatch, "mamba-ssm", "mamba_ssm.ops.selective_scan_interface", selective_scan_fn=selective_scan_fn)
    assert max(errors(SCAN, only(SCAN, "mamba_ssm")).values()) < 1e-9


def test_mamba2_takes_ours_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def mamba_chunk_scan_combined(
        x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, D: Any, z: Any, dt_bias: Any
    ) -> Any:
        assert chunk_size == 256
        return ops.ssd(x, dt, A, B, C, D, z, dt_bias=dt_bias)[0]

    path = "mamba_ssm.ops.triton.ssd_combined"
    fake(monkeypatch, "mamba-ssm", path, mamba_chunk_scan_combined=mamba_chunk_scan_combined)
    assert max(errors(SSD, only(SSD, "mamba_ssm")).values()) < 1e-9


def test_mamba3_has_heads_before_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def mamba3_siso_combined(
        Q: Any, K: Any, V: Any, ADT: Any, DT: Any, Trap: Any, Q_bias: Any, K_bias: Any, Angles: Any, D: Any, Z: Any
    ) -> Any:
        assert ADT.shape == DT.shape == Trap.shape == (2, 2, 20)
        log_decay, dt, trap = (value.transpose(1, 2) for value in (ADT, DT, Trap))
        return ops.mamba3(Q, K, V, log_decay, dt, trap, Angles, Q_bias, K_bias, D, Z)[0]

    path = "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined"
    fake(monkeypatch, "mamba-ssm", path, mamba3_siso_combined=mamba3_siso_combined)
    assert max(errors(MAMBA3, only(MAMBA3, "mamba_ssm SISO")).values()) < 1e-9
    ranked = dataclasses.replace(MAMBA3, shapes={**MAMBA3.shapes, "mimo_x": "H R P"})
    assert "TileLang" in gpu_peers.find_gpu_peers(ranked, {}, ("mamba_ssm SISO",))[1]["mamba_ssm SISO"]


@pytest.mark.parametrize("layout", ["(B,C,T)", "(B,T,C)"])
def test_causal_conv1d_has_channels_in_the_middle(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    def causal_conv1d_fn(x: Any, weight: Any, bias: Any, activation: str) -> Any:
        assert x.shape == (2, 8, 20)
        assert x.stride(1 if layout == "(B,T,C)" else 2) == 1
        return ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation)[0].transpose(1, 2)

    fake(monkeypatch, "causal-conv1d", "causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)
    case = dataclasses.replace(CONV, batch=2, time=20, sizes={"C": 8, "W": 4})
    assert max(errors(case, only(case, f"causal-conv1d {layout}")).values()) < 1e-10


class Kernel:
    """A kernel that is called the way a published one is: it fills what it is given."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def run(self, *inputs: Tensor) -> Tensor:
        return self.function(*(x.double() for x in inputs))  # type: ignore[no-any-return]

    def pull(self, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        wide = [x.double().requires_grad_() for x in inputs]
        with torch.enable_grad():
            return torch.autograd.grad(self.function(*wide), wide, grad.double())


def built(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> list[tuple[Any, ...]]:
    made: list[tuple[Any, ...]] = []

    def build(*how: Any) -> tuple[Any, str]:
        made.append(how)
        return kernel, "sha256 0"

    monkeypatch.setattr(gpu_peers, "_build", build)
    return made


def test_rwkv_lm_takes_the_raw_decay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Wkv7(Kernel):
        def forward(self, r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, y: Any, s: Any, sa: Any) -> None:
            assert s.shape == (2, 2, 2, 16, 16)
            assert r.dtype == torch.bfloat16
            y.copy_(self.run(r, w, k, v, a, b))

        def backward(self, *given: Any) -> None:
            for target, value in zip(given[9:], self.pull(given[:6], given[6]), strict=True):
                target.copy_(value)

    kernel = Wkv7(lambda r, w, k, v, a, b: ops.wkv7(r, -0.6065306597 * torch.sigmoid(w), k, v, a, b)[0])
    made = built(monkeypatch, kernel)
    peer = only(WKV7, "RWKV-LM", rwkv_lm=tmp_path)
    assert max(errors(WKV7, peer, torch.bfloat16).values()) < 0.02  # the raw decay is rounded once more
    assert "-D_N_=16" in made[0][3]
    with pytest.raises(ValueError, match="a multiple of 16"):
        errors(dataclasses.replace(WKV7, time=20), peer, torch.bfloat16)


def test_rwkv_lm_wkv6_and_wkv4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Wkv6(Kernel):
        def forward(self, B: int, T: int, C: int, H: int, *given: Any) -> None:
            assert (B, T, C, H) == (2, 20, 32, 2)
            given[5].copy_(self.run(*given[:5]))

        def backward(self, B: int, T: int, C: int, H: int, *given: Any) -> None:
            *same, gu = self.pull(given[:5], given[5])
            for target, value in zip(given[6:10], same, strict=True):
                target.copy_(value)
            given[10].copy_(gu.flatten() / B)  # one a row, summed by who calls

    built(monkeypatch, Wkv6(lambda r, k, v, w, u: ops.wkv6(r, -torch.exp(w), k, v, u)[0]))
    assert max(errors(WKV6, only(WKV6, "RWKV-LM", rwkv_lm=tmp_path), torch.bfloat16).values()) < 0.02

    class Wkv4(Kernel):
        def forward(self, B: int, T: int, C: int, w: Any, u: Any, k: Any, v: Any, y: Any) -> None:
            y.copy_(self.run(w, u, k, v))

        def backward(self, B: int, T: int, C: int, w: Any, u: Any, k: Any, v: Any, y: Any, gy: Any, *out: Any) -> None:
            gw, gu, gk, gv = self.pull((w, u, k, v), gy)
            for target, value in zip(out, (gw * w / B, gu / B, gk, gv), strict=True):  # theirs is of the stored decay
                target.copy_(value)

    built(monkeypatch, Wkv4(lambda w, u, k, v: ops.wkv4(k, v, w, u)[0]))
    assert max(errors(WKV4, only(WKV4, "RWKV-LM", rwkv_lm=tmp_path), torch.bfloat16).values()) < 0.02
    with pytest.raises(ValueError, match="built for up to 4096 tokens"):
        gpu_peers._no_longer_than(4096, 4097)


def test_vision_rwkv_has_the_decay_negated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def function(w: Any, u: Any, k: Any, v: Any) -> Any:
        return ops.bi_wkv(k, v, -w, u)

    class Older(Kernel):
        def forward(self, B: int, T: int, C: int, w: Any, u: Any, k: Any, v: Any, y: Any) -> None:
            assert k.dtype == torch.float32
            y.copy_(self.run(w, u, k, v))

        def backward(self, B: int, T: int, C: int, *given: Any) -> None:
            gw, gu, gk, gv = self.pull(given[:4], given[4])
            for target, value in zip(given[5:], (gw / B, gu / B, gk, gv), strict=True):
                target.copy_(value)

    class Newer(Kernel):
        def bi_wkv_forward(self, *given: Any) -> Any:
            return self.run(*given).float()

        def bi_wkv_backward(self, w: Any, u: Any, k: Any, v: Any, gy: Any) -> Any:
            return [x.float() for x in self.pull((w, u, k, v), gy)]

    for name, kind in (("Vision-RWKV", Older), ("Vision-RWKV new", Newer)):
        built(monkeypatch, kind(function))
        assert max(errors(BI_WKV, only(BI_WKV, name, vision_rwkv=tmp_path), torch.float32).values()) < 1e-5


def test_who_is_absent_is_told_with_the_reason(tmp_path: Path) -> None:
    found, absent = gpu_peers.find_gpu_peers(WKV7, {"rwkv_lm": None})
    assert absent["RWKV-LM"] == "no checkout given (--rwkv-lm)"
    assert {peer.name for peer in found} | set(absent) == {"fla chunk", "fla chunk, bounded", "RWKV-LM", "RWKV-LM v3"}
    _, absent = gpu_peers.find_gpu_peers(WKV7, {"rwkv_lm": tmp_path}, ("RWKV-LM",))
    assert absent["RWKV-LM"].startswith("FileNotFoundError: no ")
    assert absent["RWKV-LM"].endswith("rwkv7_clampw.cu")


# ---------------------------------------------------------------------------------------------------- memory checks


def test_memory_checks_reach_every_kernel_and_choice() -> None:
    taken: list[int] = []
    assert gpu_memcheck.every_choice("", CPU, [3, 1, 2], taken.append) == 3
    assert taken == [3, 1, 2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        found = list(gpu_memcheck.runs("cpu"))
    labels = [run.label for run in found]
    assert len(set(labels)) == len(labels)
    assert {run.every for run in found if "float32 dense" in run.label} == {True}
    served = {op for op, names in ops.backends().items() if names["triton"].serves}
    for case in CASES:
        if case.op in served:
            kinds = ["dense", "padded"] + (["packed"] if case.op != "bi_wkv" else [])
            assert all(any(x.startswith(case.op) and x.endswith(kind) for x in labels) for kind in kinds), case.op
    assert any(label.startswith("conv-w4-silu") and "T=1 dense" in label for label in labels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_memory_checks_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_memcheck.main(["--rehearse", "--only", "conv-w2 T=1"]) == 0
    assert "1 of 1 runs" in capsys.readouterr().out
    assert gpu_memcheck.main(["--rehearse", "--only", "conv-w2", "--part", "4/5"]) == 0
    assert "0 of 4 runs" in capsys.readouterr().out
    assert gpu_memcheck.main(["--rehearse", "--only", "nothing like it"]) == 1


def test_parts_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        def __init__(self, command: list[str]) -> None:
            self.command = command

        def wait(self) -> int:
            return -11 if self.command[-1] == "1/3" else 0

    monkeypatch.setattr(gpu_memcheck.subprocess, "Popen", Process)
    assert gpu_memcheck._in_parts(3, ["--only", ""]) == 11
    assert gpu_memcheck._in_parts(1, ["--only", ""]) == 0


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for machines without a GPU")
def test_models_are_rehearsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models.json"
    assert gpu_models.main(["--rehearse", "--models", "Mamba 130M", "--out", str(out)]) == 0
    document = json.loads(out.read_text("utf-8"))
    assert document["kind"] == "gpu models"
    rows = {(row["task"], row["model"], row["how"]): row for row in document["rows"]}
    assert ("training", "transformer like Mamba 130M", "eager") in rows
    decoded = rows["decode", "Mamba 130M", "eager"]
    assert decoded["tokens_per_second"] > 0 < decoded["roof"]
    assert rows["decode", "Mamba 130M", "graph"]["skipped"] == "RuntimeError: a CUDA graph needs a GPU"
    assert out.with_suffix(".png").read_bytes().startswith(PNG)
    table = capsys.readouterr().out
    assert "| Mamba 130M | eager |" in table
    plot.main([str(out)])
    assert capsys.readouterr().out.strip() in table


def test_a_transformer_of_the_same_size() -> None:
    size = gpu_models.Size("m", "rwkv7", 6, 128, 64)
    model = gpu_models.empty_model(size, CPU, torch.float32)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    other = gpu_models.transformer_like(model, size, CPU)
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, other)]
    assert abs(counts[0] - counts[1]) < 13 * 128**2


def test_decoding_is_what_the_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    size = gpu_models.Size("m", "rwkv4", 2, 16, 32)
    model = gpu_models.empty_model(size, CPU, torch.float32)
    torch.manual_seed(3)
    run, held = gpu_models._stepper(model, 2, CPU, "eager")
    torch.manual_seed(3)
    token = torch.randint(32, (2,))
    state = model.init_state(2)
    assert held == state.nbytes
    for _ in range(gpu_models.DECODED):
        logits, state = model.step(token, state)
        token = logits.argmax(-1)
    assert torch.equal(run(), token)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------- one command


def about(**more: Any) -> dict[str, Any]:
    return {"torch": "2.11.0", "cuda": "13.0", "devices": 1, "file": "/t/torch/__init__.py", "missing": []} | more


def test_a_python_is_found_or_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        "gone": {},
        "bare": about(torch=None, cuda=None, devices=0, error="ModuleNotFoundError: No module named 'torch'"),
        "cpu": about(cuda=None),
        "blind": about(devices=0),
        "good": about(name="NVIDIA H200"),
    }
    monkeypatch.setattr(gpu_machine, "ask", lambda python: gpu_machine.Found(python, known[python]))
    assert gpu_machine.find_python(list(known)).python == "good"
    assert gpu_machine.find_python(["bare", "cpu"], rehearse=True).python == "cpu"
    with pytest.raises(gpu_machine.CannotRun) as error:
        gpu_machine.find_python(["gone", "bare", "cpu", "blind"])
    told = str(error.value)
    assert "gone: does not run" in told
    assert "bare: no torch (ModuleNotFoundError" in told
    assert "cpu: torch 2.11.0, built without CUDA" in told
    assert "blind: torch 2.11.0 for CUDA 13.0, no device" in told
    assert "none is fetched" in told


def test_what_a_python_has_is_asked_of_it() -> None:
    found = gpu_machine.ask(sys.executable)
    assert found.about["torch"] == torch.__version__
    assert found.about["file"] == torch.__file__
    assert found.about["missing"] == [] or set(found.about["missing"]) <= {*gpu_machine.NEEDED, *gpu_machine.WELCOME}
    assert gpu_machine.ask("/no/such/python").about == {}


@pytest.mark.long
def test_an_environment_borrows_torch_and_finds_the_checkout(tmp_path: Path) -> None:
    found = gpu_machine.ask(sys.executable)
    python = gpu_machine.prepare(found, tmp_path / "env", None)
    have = gpu_machine.ask(python)
    assert have.about["file"] == torch.__file__
    assert Path(python).parent.parent == tmp_path / "env"
    import subprocess

    asked = [python, "-c", "import statewise; print(statewise.__file__)"]
    where = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.strip()
    assert Path(where) == gpu_machine.ROOT / "src" / "statewise" / "__init__.py"


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = gpu_machine.ask(sys.executable)
    python = str(tmp_path / "env" / "bin" / "python")
    lacking = {**real.about, "missing": ["hypothesis", "xdist"]}
    monkeypatch.setattr(gpu_machine, "ask", lambda which: gpu_machine.Found(which, lacking))
    fetched: list[Any] = []
    monkeypatch.setattr(gpu_machine, "_fetch", lambda *given: fetched.append(given))
    with pytest.raises(gpu_machine.CannotRun, match=r"missing: hypothesis, and pip .* make gpu WHEELS=wheels"):
        gpu_machine.prepare(gpu_machine.Found(sys.executable, lacking), tmp_path / "env", None)
    assert fetched[0][0].python == python


def test_torch_is_held_while_something_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []

    def run(command: list[str], **rest: Any) -> Any:
        ran.append(command)
        return argparse.Namespace(returncode=0)

    monkeypatch.setattr(gpu_machine.subprocess, "run", run)
    have = gpu_machine.Found("python", about(triton="3.6.0", missing=["hypothesis", "xdist"]))
    packages = {**gpu_machine.NEEDED, **gpu_machine.WELCOME}
    gpu_machine._fetch(have, tmp_path, None, packages)
    assert [command[-1] for command in ran] == ["--version", "hypothesis", "pytest-xdist"]
    assert (tmp_path / "constraints.txt").read_text() == "torch==2.11.0\ntriton==3.6.0\n"
    assert all("--constraint" in command for command in ran[1:])
    ran.clear()
    gpu_machine._fetch(have, tmp_path, tmp_path / "wheels", packages)
    assert all({"--no-index", "--find-links"} <= set(command) for command in ran[1:])


def options(*arguments: str) -> argparse.Namespace:
    return gpu_machine.parse(arguments)


def test_stages_are_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen = options("--stages", "tests ops", "--minutes", "8", "--results", str(tmp_path), "--rwkv-lm", "x")
    assert chosen.stages == ("tests", "ops")
    with pytest.raises(SystemExit):
        options("--stages", "test")
    tests = gpu_machine.commands("tests", "py", chosen, parallel=True)
    assert all("--numprocesses" in command for command, _ in tests)
    assert tests[0][0][-2:] == ["-k", "triton"]
    assert all(
        (gpu_machine.ROOT / part).exists() for command, _ in tests for part in command if part.startswith("tests")
    )
    ((command, _),) = gpu_machine.commands("ops", "py", chosen, parallel=True)
    assert command[command.index("--rwkv-lm") + 1] == str(Path("x").resolve())
    assert command[command.index("--minutes") + 1] == "8.0"
    assert str(tmp_path) in command[command.index("--out") + 1]
    # What is passed on is understood there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    benchmark.parse(command[3:])
    ((command, _),) = gpu_machine.commands("models", "py", chosen, parallel=True)
    gpu_models.parse(command[3:])
    monkeypatch.setattr(gpu_machine, "find_sanitizer", lambda: None)
    assert gpu_machine.commands("memcheck", "py", chosen, parallel=True) == []
    monkeypatch.setattr(gpu_machine, "find_sanitizer", lambda: "/x/compute-sanitizer")
    first, second = gpu_machine.commands("memcheck", "py", chosen, parallel=True)
    assert second[0][0] == "/x/compute-sanitizer"
    assert first[0][:3] == second[0][-3:] == ["py", "-m", "benchmarks.gpu_memcheck"]
    assert second[1] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_a_stage_that_fails_keeps_none_of_the_others_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_machine, "find_python", lambda *a, **k: gpu_machine.Found(sys.executable, about()))
    monkeypatch.setattr(gpu_machine, "prepare", lambda *a: sys.executable)
    monkeypatch.setattr(gpu_machine, "ask", lambda python: gpu_machine.Found(python, about()))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    clean = "import os, sys; sys.exit('TRITON_INTERPRET' in os.environ)"
    table = {
        "tests": [([sys.executable, "-c", "raise SystemExit(1)"], {}), ([sys.executable, "-c", clean], {})],
        "memcheck": [],
        "ops": [([sys.executable, "-c", clean], {})],
        "models": [([sys.executable, "-c", "import os, sys; sys.exit(os.environ['MORE'] != '1')"], {"MORE": "1"})],
    }
    monkeypatch.setattr(gpu_machine, "commands", lambda stage, *a, **k: table[stage])
    assert gpu_machine.main([]) == 1
    told = capsys.readouterr().out.strip().splitlines()[-4:]
    assert told[0].startswith("tests      FAILED, exit status 1")
    assert told[1].split() == ["memcheck", "left", "out:", "compute-sanitizer", "is", "not", "installed"]
    assert told[2].startswith("ops        ok")
    assert told[3].startswith("models     ok")
    assert gpu_machine.main(["--stages", "ops"]) == 0


def test_nothing_is_run_where_nothing_can(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(*given: Any, **more: Any) -> Any:
        raise gpu_machine.CannotRun("no Python here has a torch that sees a GPU")

    monkeypatch.setattr(gpu_machine, "find_python", none)
    assert gpu_machine.main([]) == 2
    assert "no Python here" in capsys.readouterr().err
