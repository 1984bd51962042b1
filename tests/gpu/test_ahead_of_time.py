"""Every kernel compiled for GPUs that are not here: nothing spills, everything fits, no T or B compiles anew, and how
often a product is made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_ahead import repeated
from benchmarks.gpu_cases import CASES

triton = pytest.importorskip("triton")

KIB = 1024
MOST_SHARED = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
# What is spilled is a matter of the release, too: bytes a thread at most with 3.6, which comes with torch 2.11.
OLDER = tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9)
SPILLS = {("selective_scan", "backward"): 168, ("ssd", "emit"): 16} if OLDER else {}
# Products that are made more than once: tiles of 16 by 16 have fewer pieces than a program has warps, and `carry` has
# its loads under way early rather than its warps along both axes, where it cannot have both (sm_90).
REPEATED = {("wkv6", "summaries"): 2.0, ("wkv6", "emit"): 1.4, ("wkv6", "backward"): 2.2, ("ssd", "carry"): 1.5}
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
            assert 1.0 <= kernel["repeated"] <= REPEATED.get((op, kernel["kernel"]), 1.0), where
            assert kernel["shared_bytes"] <= MOST_SHARED[kernel["sm"]], where
    assert done.returncode == int(any(name == op for name, _ in SPILLS))


LAYOUTS = """
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}>
#mma1 = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 2], instrShape = [16, 32, 16]}>
"""
EIGHT_HIGH = "%2 = tt.dot %0, %1, %z : tensor<32x64xf32, #a> * tensor<64x32xf32, #b> -> tensor<32x32xf32, #mma>\n"
FOUR_BY_TWO = (
    "%3 = ttng.warp_group_dot %0, %1, %z {inputPrecision = 0 : i32} : !ttg.memdesc<64x64xbf16, #s, #smem> *"
    " !ttg.memdesc<64x64xbf16, #s, #smem> -> tensor<64x64xf32, #mma1> loc(#loc1)\n"
)


@pytest.mark.parametrize(
    ("products", "times"),
    [("", 1.0), (EIGHT_HIGH, 4.0), (FOUR_BY_TWO, 1.0), (EIGHT_HIGH * 4 + FOUR_BY_TWO, 2.5)],
)
def test_products_that_warps_repeat(products: str, times: float) -> None:
    assert repeated(LAYOUTS + products) == times


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
