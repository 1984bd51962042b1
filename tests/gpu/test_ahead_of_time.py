"""Every kernel compiled for GPUs that are not here: nothing spills, everything fits, no T or B compiles anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_cases import CASES

pytest.importorskip("triton")

KIB = 1024
MOST_SHARED = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
# What falls short: bytes a thread spills at most, said in the operator's README, too. Everything else spills nothing.
SPILLS = {("wkv7", "backward"): 64}
OPS = sorted({case.op for case in CASES})


def alone(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process that compiles kernels instead of interpreting them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_nothing_spills(op: str, tmp_path: Path) -> None:
    out = tmp_path / "ahead.json"
    capabilities = ",".join(map(str, MOST_SHARED))
    done = alone(
        "-m", "benchmarks.gpu_ahead", "--ops", op, "--dtypes", "bfloat16", "--capabilities", capabilities,
        "--out", str(out),
    )  # fmt: skip
    assert out.exists(), done.stderr[-2000:]
    results = json.loads(out.read_text())["results"]
    assert [entry["case"] for entry in results] == [case.label for case in CASES if case.op == op]
    for entry in results:
        assert {kernel["sm"] for kernel in entry["kernels"]} == set(MOST_SHARED)
        for moved, floor in zip(entry["tensors"], entry["floor"], strict=True):
            assert moved >= floor, "a floor is what must move at least"
        for kernel in entry["kernels"]:
            where = f"{entry['case']}: {kernel['kernel']} on sm_{kernel['sm']}"
            assert kernel["spilled_bytes"] <= SPILLS.get((op, kernel["kernel"]), 0), where
            assert kernel["shared_bytes"] <= MOST_SHARED[kernel["sm"]], where
    assert done.returncode == int(any(name == op for name, _ in SPILLS))


# (B, T) of the ways an operator may go: few rows cut into pieces, many rows whole, some tokens, hardly any; and others:
# one token or two, odd numbers of them and multiples of 16, one row and many.
WAYS = [(1, 4096), (64, 2048), (1, 240), (1, 3)]
OTHERS = [
    (1, 1),
    (2, 1),
    (2, 2),
    (1, 100),
    (1, 112),
    (3, 1000),
    (3, 1001),
    (3, 1008),
    (17, 1000),
    (1, 4097),
    (64, 2049),
]

SIGNATURES = f"""
import dataclasses, json, torch
from benchmarks.gpu_ahead import launches, signature
from benchmarks.gpu_cases import CASES
def kinds(case, batch, time):
    noted = launches(dataclasses.replace(case, batch=batch, time=time), torch.bfloat16, full=True)[1]
    return sorted({{f"{{one.kernel.__name__}} {{signature(one)}} {{one.options}}" for one in noted}})
print(json.dumps([[[kinds(case, *size) for size in sizes] for sizes in {[WAYS, OTHERS]}] for case in CASES]))
"""


@pytest.fixture(scope="module")
def signatures() -> list[list[list[list[str]]]]:
    """By case, of WAYS and of OTHERS, by size."""
    done = alone("-c", SIGNATURES)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[list[list[str]]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.label for case in CASES])
def test_no_length_and_no_batch_compiles_anew(signatures: list[list[list[list[str]]]], index: int) -> None:
    """An operator may go different ways at different sizes, but what it compiles is a fixed set: none is of a size."""
    ways, others = signatures[index]
    known = {kind for kinds in ways for kind in kinds}
    for kinds, size in zip(others, OTHERS, strict=True):
        assert kinds
        assert set(kinds) <= known, size
