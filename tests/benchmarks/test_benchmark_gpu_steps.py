"""The benchmark of decoding steps: what is counted, and a rehearsal of the whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_steps as benchmark
from statewise.ops import gpu, pool


@pytest.mark.parametrize("case", benchmark.CASES, ids=lambda case: case.op)
def test_bytes_are_those_of_the_docstring(case: benchmark.StepCase) -> None:
    """The formula beside each step in :mod:`statewise.ops.pool`, for one more token."""
    assert pool.__doc__ is not None
    line = re.search(rf"\| {case.op} \| (.+?) \| (.+?) \|", pool.__doc__)
    assert line is not None
    spelt = f"({line[1]}) + ({line[2]})"
    letters = {"G": 1, **case.sizes, "S": 4, "A": 2}
    count = eval(re.sub(r"(?<=[\w)]) (?=[\w(])", "*", spelt), {}, letters)
    one, two = (benchmark.Decoding(case, batch, torch.float32, "cpu").bytes() for batch in (1, 2))
    assert two - one == count + torch.int64.itemsize, "an entry of the index, too"


@pytest.mark.skipif(bool(gpu.serves(torch.device("cpu"))), reason="kernels run on a GPU here, not in the interpreter")
def test_a_rehearsal_writes_a_row_for_every_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "steps.json"
    assert benchmark.main(["--rehearse", "--batches", "1,2", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["rehearsal"]
    assert {row["op"] for row in told["results"]} == {case.op for case in benchmark.CASES}
    assert len(told["results"]) == 4 * len(benchmark.CASES) == len(capsys.readouterr().out.splitlines())
    for row in told["results"]:
        assert row["triton_us"] > 0
        assert row["torch_us"] > 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 2
    assert "no GPU" in capsys.readouterr().out
