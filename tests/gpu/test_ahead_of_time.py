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


# (B, T) so near each other that an operator goes the same way for all of a group.
NEIGHBOURS = [[(3, 1000), (3, 1001), (3, 1008)], [(16, 1000), (17, 1000)], [(2, 1), (2, 2)], [(1, 100), (1, 112)]]

SIGNATURES = f"""
import dataclasses, json, torch
from benchmarks.gpu_ahead import launches, signature
from benchmarks.gpu_cases import CASES
def kinds(case, batch, time):
    noted = launches(dataclasses.replace(case, batch=batch, time=time), torch.bfloat16, full=True)[1]
    return sorted({{f"{{one.kernel.__name__}} {{signature(one)}} {{one.options}}" for one in noted}})
print(json.dumps([[[kinds(case, *size) for size in group] for group in {NEIGHBOURS}] for case in CASES]))
"""


@pytest.fixture(scope="module")
def signatures() -> list[list[list[list[str]]]]:
    """By case, group and size of the group."""
    done = alone("-c", SIGNATURES)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[list[list[list[str]]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.label for case in CASES])
def test_no_length_and_no_batch_compiles_anew(signatures: list[list[list[list[str]]]], index: int) -> None:
    for group, sizes in zip(signatures[index], NEIGHBOURS, strict=True):
        for kinds, size in zip(group, sizes, strict=True):
            assert kinds
            assert set(kinds) ^ set(group[0]) == set(), (size, sizes[0])
