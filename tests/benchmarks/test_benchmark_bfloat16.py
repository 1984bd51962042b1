"""The benchmark of activations' dtypes: what its file tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bfloat16 as benchmark
from statewise import ops

pytestmark = pytest.mark.skipif(not ops.backends()["wkv4"]["native"].serves, reason="no compiled kernels here")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LEAST", 0.0)
    monkeypatch.setattr(benchmark, "IN_CACHE", 4)


def test_every_length_is_told_beside_a_single_token(tmp_path: Path) -> None:
    out = tmp_path / "results" / "file.json"
    benchmark.main(["--ops", "token_mix,wkv4", "--lengths", "8", "--repeats", "1", "--threads", "1", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["complete"]
    assert [(row["op"], row["T"]) for row in document["rows"]] == [
        (op, T) for op in ("token_mix", "wkv4") for T in (1, 4, 8)
    ]
    for row in document["rows"]:
        assert row["both_gain"] == pytest.approx(row["both_float32_ms"] / row["both_bfloat16_ms"], abs=1e-3, rel=1e-3)
    one, _, last = document["rows"][:3]
    beyond = 1e6 * (last["forward_bfloat16_ms"] - one["forward_bfloat16_ms"]) / 7
    assert last["forward_bfloat16_ns_a_token"] == pytest.approx(beyond, abs=1)


@pytest.mark.parametrize("wrong", [["--ops", "wkv4,attention"], ["--lengths", "8,many"], ["--lengths", "0"]])
def test_what_cannot_be_run_is_named(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(wrong)
    assert wrong[0] in capsys.readouterr().err
