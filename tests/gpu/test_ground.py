"""The ground under the GPU kernels: slots, launches, choices by the clock, and the device functions they share."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from statewise.ops import gpu

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
parts = pytest.importorskip("statewise.ops.triton_parts")
# Names that kernels use must be globals of this module.
locate_slot, apart, dot, onto = parts.locate_slot, parts.apart, parts.dot, parts.onto
softplus, sigmoid, silu = parts.softplus, parts.sigmoid, parts.silu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit(do_not_specialize=["time"])
def _locate(out, time, lengths, cu_seqlens, row_of, L: tl.constexpr, RAGGED: tl.constexpr):  # type: ignore[no-untyped-def]
    slot = tl.program_id(0)
    row, chunk, token, here = locate_slot(slot, time, lengths, cu_seqlens, row_of, L, RAGGED)
    tl.store(out + slot * 4, row)
    tl.store(out + slot * 4 + 1, chunk)
    tl.store(out + slot * 4 + 2, token)
    tl.store(out + slot * 4 + 3, here)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    chunk=st.sampled_from([1, 3, 16, 64]),
    kind=st.sampled_from(["dense", "padded", "packed"]),
)
@example(sizes=[0, 0, 16, 0, 0], chunk=16, kind="packed")
@example(sizes=[0], chunk=16, kind="packed")
@example(sizes=[15, 1, 16, 17], chunk=16, kind="packed")
def test_slots_cover_every_token_once(sizes: list[int], chunk: int, kind: str) -> None:
    if kind == "dense":
        sizes = [max(1, sizes[0])] * len(sizes)
    time = sum(sizes) if kind == "packed" else max(1, *sizes)
    starts = list(accumulate([0, *sizes])) if kind == "packed" else [i * time for i in range(len(sizes))]
    model = torch.empty(1 if kind == "packed" else len(sizes), time, device=DEVICE)
    lengths = torch.tensor(sizes, device=DEVICE) if kind == "padded" else None
    bounds = torch.tensor(starts, device=DEVICE) if kind == "packed" else None
    at = gpu.place(model, (lengths, bounds), chunk)
    assert (at.rows, at.time) == (len(sizes), time)
    found = torch.full((at.slots, 4), -1, device=DEVICE)
    gpu.launch(_locate, (at.slots,), found, *at.arguments, L=chunk, RAGGED=at.ragged)
    seen, firsts = [], []
    for row, index, token, here in found.tolist():
        assert here <= chunk
        assert token == starts[row] + index * chunk
        seen += range(token, token + here)
        firsts += [row] if index == 0 else []
    assert seen == [start + t for start, size in zip(starts, sizes, strict=False) for t in range(size)]
    assert firsts == list(range(len(sizes))), "an empty sequence has a first chunk too"


def test_room_for_outputs() -> None:
    like = torch.ones(2, 3, dtype=torch.bfloat16)
    padded = gpu.new(like, (torch.tensor([1, 3]), None), (4, 5))
    assert (padded.shape, padded.dtype, bool(padded.any())) == ((4, 5), torch.bfloat16, False)
    assert gpu.new(like, (None, None)).shape == like.shape


@triton.jit
def _fill(out, value, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(out + tl.arange(0, BLOCK), tl.zeros((BLOCK,), tl.float32) + value)


def test_capture_notes_and_runs_nothing() -> None:
    out = torch.full((4,), 7.0, device=DEVICE)
    with gpu.capture() as outer:
        gpu.launch(_fill, (1, 2), out, 3, warps=8, stages=5, BLOCK=4)
        with gpu.capture() as inner:
            gpu.launch(_fill, (0,), out, 4, BLOCK=4)
        gpu.launch(_fill, (1,), out, 5, BLOCK=4)
    assert out.tolist() == [7.0] * 4
    assert [one.arguments["value"] for one in outer] == [3, 5]
    assert [one.arguments["value"] for one in inner] == [4]
    assert outer[0].kernel is _fill
    assert outer[0].grid == (1, 2)
    assert outer[0].arguments["out"] is out
    assert outer[0].arguments["BLOCK"] == 4
    assert outer[0].options == {"num_warps": 8, "num_stages": 5}
    with pytest.raises(KeyError), gpu.capture():
        raise KeyError
    gpu.launch(_fill, (0,), out, 5, BLOCK=4)
    assert out.tolist() == [7.0] * 4, "an empty grid"
    gpu.launch(_fill, (1,), out, 5, BLOCK=4)
    assert out.tolist() == [5.0] * 4


def test_where_kernels_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.serves(cpu) == gpu.serves(cuda) == ""
    assert "serve CUDA devices, not meta" in gpu.serves(torch.device("meta"))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert gpu.serves(cuda) == ""
    assert "serve CUDA devices, not cpu" in gpu.serves(cpu)
    assert "TRITON_INTERPRET=1" in gpu.serves(cpu)
    with gpu.capture():
        assert gpu.serves(cpu) == gpu.serves(torch.device("meta")) == ""
    monkeypatch.setattr(gpu, "_FOUND", False)
    assert "pip install triton" in gpu.serves(cuda)


def test_precision_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    half = (torch.bfloat16, torch.float16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert [gpu.dot_precision(x) for x in (torch.float64, torch.float32, *half)] == [
        "ieee", "ieee", "bf16-emulated", "bf16-emulated",
    ]  # fmt: skip
    assert {gpu.dot_precision(x, True) for x in half} == {"tf32-emulated"}
    monkeypatch.delenv("TRITON_INTERPRET")
    assert [gpu.dot_precision(x) for x in (torch.float64, torch.float32, *half)] == ["ieee", "tf32x3", "bf16", "bf16"]
    assert {gpu.dot_precision(x, True) for x in half} == {"tf32"}
    assert gpu.dot_precision(torch.float32, True) == "tf32x3"
    assert gpu.dot_precision(torch.float64, True) == "ieee"


def test_precise_is_asked_for_and_over() -> None:
    assert not gpu.asked_precise()
    with gpu.precise():
        assert gpu.asked_precise()
        with gpu.precise(False):
            assert not gpu.asked_precise()
        assert gpu.asked_precise()
    with pytest.raises(KeyError), gpu.precise():
        raise KeyError
    assert not gpu.asked_precise()


class Clock:
    """A GPU that is not there: what would be measured takes the times given."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self.times: dict[str, float] = {}
        self.measured: list[str] = []
        self.capturing = False
        self.patch = patch
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setattr(torch.cuda, "get_device_name", lambda _: "A GPU/8 (x)")
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(triton.testing, "do_bench", self.bench)
        self.forget()

    def bench(self, run: Any, **_: Any) -> float:
        run()
        return self.times[self.measured[-1]]

    def forget(self) -> None:
        """As in a new process."""
        self.patch.setattr(gpu, "_chosen", {})

    def tune(self, key: str = "op") -> str:
        self.measured.clear()
        return str(gpu.tune(key, torch.device("cuda", 0), list(self.times), self.measured.append))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock(monkeypatch, tmp_path / "cache")
    clock.times = {"a": 3.0, "b": 1.0, "c": 2.0}
    return clock


def test_off_a_gpu_the_first_choice(clock: Clock, tmp_path: Path) -> None:
    def never(_: object) -> None:
        raise AssertionError

    assert gpu.tune("op", torch.device("cpu"), ["a", "b"], never) == "a"
    assert gpu.tune("op", torch.device("cuda"), ["only"], never) == "only"
    with gpu.capture():
        assert gpu.tune("op", torch.device("cuda"), ["a", "b"], never) == "a"
    assert not (tmp_path / "cache").exists()


def test_the_fastest_is_found_once(clock: Clock) -> None:
    assert clock.tune() == "b"
    assert clock.measured == ["a", "b", "c"]
    assert clock.tune() == "b"
    assert clock.measured == []
    clock.forget()
    assert clock.tune() == "b"
    assert clock.measured == [], "remembered on disk"
    clock.times = {"a": 1.0, "b": 2.0}
    assert clock.tune("another") == "a"
    assert clock.measured == ["a", "b"]
    clock.forget()
    assert (clock.tune("op"), clock.measured) == ("b", [])


def test_nothing_is_measured_while_a_graph_is_captured(clock: Clock) -> None:
    clock.capturing = True
    assert (clock.tune(), clock.measured) == ("a", [])
    clock.capturing = False
    assert clock.tune() == "b"
    clock.capturing = True
    assert clock.tune() == "b"


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b"\xff\xfe", b'{"op": "b"}', b'{"op": 3}', b'{"op": -1}', b"null"]
)
def test_a_damaged_memory_is_measured_anew(clock: Clock, damage: bytes) -> None:
    clock.tune()
    path = gpu._cache_file(torch.device("cuda", 0))
    assert path.parent.name == "statewise"
    assert path.name == f"triton-{triton.__version__}-A-GPU-8--x-.json"
    path.write_bytes(damage)
    clock.forget()
    assert clock.tune() == "b"
    assert clock.measured == ["a", "b", "c"]
    assert gpu._read(path) == {"op": 1}


def test_a_memory_that_cannot_be_written_is_only_slower(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert clock.tune() == "b"
    assert clock.tune() == "b"
    assert clock.measured == []


@triton.jit
def _apply(x, out, WHICH: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if WHICH == "softplus":
        value = softplus(value)
    elif WHICH == "sigmoid":
        value = sigmoid(value)
    else:
        value = silu(value)
    tl.store(out + i, value)


@pytest.mark.parametrize("which", ["softplus", "sigmoid", "silu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_activations_far_out(which: str, dtype: torch.dtype) -> None:
    far = [0, 1e-30, 1e-9, 1e-4, 0.5, 1, 5, 19.999, 20, 20.001, 40, 80, 100, 700, 800, 1e4, 1e30]
    some = torch.tensor([*far, *[-x for x in far], *torch.linspace(-25, 25, 64 - 2 * len(far)).tolist()])
    if which != "silu":  # whose far left is 0 · -inf, as in torch
        some[:2] = torch.tensor([torch.inf, -torch.inf])
    x = some.to(DEVICE, dtype)
    out = torch.empty_like(x)
    gpu.launch(_apply, (1,), x, out, WHICH=which, BLOCK=64)
    function = torch.sigmoid if which == "sigmoid" else getattr(torch.nn.functional, which)
    # e^x of a large x has as many more wrong bits as x has before the point.
    exact, smallest = (1e-13, 1e-300) if dtype == torch.float64 else (1e-5, 1e-37)
    # Above 20 softplus is the identity, here and in torch: 2e-9 off.
    torch.testing.assert_close(out.double(), function(x.double()), rtol=exact, atol=smallest)


@triton.jit
def _product(a, b, c, PRECISION: tl.constexpr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    left = tl.load(a + m[:, None] * K + k[None, :])
    right = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], dot(left, right, PRECISION))


def _dot_error(dtype: torch.dtype, precision: str) -> float:
    a, b = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in ((32, 64), (64, 16)))
    c: Tensor = torch.empty(32, 16, dtype=dtype, device=DEVICE)
    gpu.launch(_product, (1,), a, b, c, PRECISION=precision, M=32, K=64, N=16)
    want = a.double() @ b.double()
    return float((c.double() - want).norm() / want.norm())


# Each operand rounded to p bits after the point is off by 2^-(p+1) / √3 · rms(1 / mantissa); a product of two by 0.59.
ROUNDED = {"bf16": 0.59 * 2**-8, "tf32": 0.59 * 2**-11}


@pytest.mark.parametrize("which", ROUNDED)
def test_rounded_products_are_rounded_once_and_to_nearest(which: str) -> None:
    error = _dot_error(torch.float32, which if DEVICE == "cuda" else f"{which}-emulated")
    # A GPU may round to tf32 by cutting bits off.
    assert 0.8 * ROUNDED[which] <= error <= (2.4 if (DEVICE, which) == ("cuda", "tf32") else 1.2) * ROUNDED[which]


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [(torch.float64, "ieee", 1e-15), (torch.float32, "ieee", 5e-7), (torch.float32, "tf32x3", 1e-6)],
)
def test_exact_products(dtype: torch.dtype, precision: str, bound: float) -> None:
    assert _dot_error(dtype, precision) <= bound


@triton.jit
def _products(a, b, c, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    m, n = tl.arange(0, M), tl.arange(0, N)
    left = tl.load(a + m[:, None] * N + n[None, :])
    right = tl.load(b + n[:, None] * M + m[None, :])
    first = apart(left, right, PRECISION)
    tl.store(c + m[:, None] * M + m[None, :], onto(first, left + 1, right, PRECISION, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_products_in_blocks_of_their_own(dtype: torch.dtype) -> None:
    """On a CPU float32 goes the way it would on a GPU, in three parts, but for what TF32 rounds of them."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    a, b = (torch.randn(shape, dtype=wide, device=DEVICE) for shape in ((32, 64), (64, 32)))
    precision = gpu.dot_precision(dtype) if dtype != torch.float32 else "tf32x3"
    c = torch.empty(32, 32, dtype=wide, device=DEVICE)
    gpu.launch(_products, (1,), a, b, c, PRECISION=precision, M=32, N=64)
    want = (2 * a.double() + 1) @ b.double()
    assert (c.double() - want).norm() <= {8: 1e-15, 4: 1e-6, 2: 5e-3}[dtype.itemsize] * want.norm()


def test_infinite_factors_of_three_products_stay_where_they_are() -> None:
    a, b = torch.randn(32, 64, device=DEVICE), torch.rand(64, 32, device=DEVICE) + 0.1
    a[3, 5], a[7, 0], b[9, 4] = torch.inf, -torch.inf, torch.inf
    c = torch.empty(32, 32, device=DEVICE)
    gpu.launch(_products, (1,), a, b, c, PRECISION="tf32x3", M=32, N=64)
    want = a @ b + (a + 1) @ b
    assert torch.equal(c.isfinite(), want.isfinite())
    torch.testing.assert_close(c[c.isfinite()], want[want.isfinite()], rtol=1e-5, atol=1e-4)


def alone(code: str) -> str:
    """Run ``code`` in a process that does not ask for the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_cpu_without_the_interpreter_is_refused_and_loads_no_kernel() -> None:
    said = alone("""
import sys, torch, statewise
from statewise import ops
from statewise.testing import cases, laws
assert "triton" not in sys.modules, "imported"
for case in cases.CASES:
    laws.run(case, case.inputs(1, 3), case.begin(1))
    status = ops.backends()[case.op]["triton"]
    if not torch.cuda.is_available():
        assert not status.serves
    try:
        case.call(case.inputs(1, 3), backend="triton")
    except ValueError as error:
        assert str(error) == f"{case.op}: backend 'triton' cannot serve: {status.reason}" or status.serves, error
        assert "\\n" not in str(error)
    else:
        raise AssertionError(case.id)
# torch itself may import triton when an operator of ours first runs; our modules that need it are not among those.
print([name for name, module in sys.modules.items() if name.startswith("statewise") and hasattr(module, "tl")])
""")
    assert said == "[]"
