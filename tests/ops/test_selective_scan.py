"""selective_scan: the published package's numbers, equal forms in every size, and steps no softplus would make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from statewise.ops import gpu
from statewise.ops.selective_scan import parallel, selective_scan, selective_scan_step

# Triton's where its interpreter runs; on a GPU tests/gpu/test_selective_scan_triton.py holds it.
INTERPRETED = () if gpu.serves(torch.device("cpu")) else ("triton",)
BACKENDS = ("reference", "torch", "native", *INTERPRETED)
backends = pytest.mark.parametrize("backend", BACKENDS)

CASES = (
    "usual",
    "init_state",
    "groups2",
    "const_bc",
    "plain_no_extras",
    "len1",
    "len2_noz",
    "longmem",
    "extreme_dt",
    "packed",
    "bf16_inputs",
    "fp16_inputs",
)
#: dt reaches 1e4 here and its gradient grows with it: held to 1e-4 in float32.
STRESS = ("longmem", "extreme_dt")
LONG = ("longmem", "const_bc")  # for the interpreter: many tokens, or a program for each channel


def relative(x: Tensor, y: Tensor) -> float:
    x, y = x.detach().double(), y.detach().double()
    assert torch.isfinite(x).all()
    return float((x - y).norm() / y.norm().clamp(min=1e-300))


def time_second(x: Tensor) -> Tensor:
    """Upstream's (batch, ..., L) as ours."""
    return x.movedim(-1, 1)


class Published:
    """One golden case, its leaves in upstream's layout."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self.file = load_file(path)
        self.leaves = {
            name[3:]: value.to(dtype, copy=True).requires_grad_()
            for name, value in self.file.items()
            if name.startswith("in.") and value.dtype.is_floating_point
        }
        self.dtype = dtype

    def call(self, backend: str, softplus: bool) -> tuple[Tensor, Tensor]:
        given = self.leaves
        x, dt = time_second(given["u"]), time_second(given["delta"])
        if given["B"].dim() == 2:  # constant: a group for every channel
            B, C = (given[name].expand(*x.shape[:2], -1, -1) for name in ("B", "C"))
        else:
            B, C = time_second(given["B"]), time_second(given["C"])
        z = time_second(given["z"]) if "z" in given else None
        y, end = selective_scan(
            x,
            dt,
            given["A"],
            B,
            C,
            given.get("D"),
            z,
            dt_bias=given.get("delta_bias"),
            dt_softplus=softplus,
            state=given.get("initial_state", given.get("initial_states")),
            cu_seqlens=self.file.get("in.cu_seqlens"),
            backend=backend,
        )
        return y.movedim(1, -1), end


def softplus_of(path: Path) -> bool:
    return bool(json.loads(path.with_suffix(".json").read_text()).get("delta_softplus", True))


@pytest.mark.parametrize(
    ("case", "backend"), [(c, b) for b in BACKENDS for c in CASES if b != "triton" or c not in LONG]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_numbers(shared: Path, case: str, backend: str, dtype: torch.dtype) -> None:
    path = shared / f"golden/mamba/ops/m1_scan_{case}.safetensors"
    published = Published(path, dtype)
    y, end = published.call(backend, softplus_of(path))
    file = published.file
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    assert relative(y, file["f64.out"]) <= bound
    packed = case == "packed"
    assert relative(end, file["f64.final_states" if packed else "f64.final_state"]) <= bound

    if dtype == torch.float32 and case in STRESS:
        bound = 1e-4
    chosen, cotangents = [y], [file["cot.out"].to(dtype)]
    if not packed:
        chosen.append(end)
        cotangents.append(file["cot.final_state"].to(dtype))
    names = list(published.leaves)
    found = torch.autograd.grad(chosen, list(published.leaves.values()), cotangents, retain_graph=True)
    for name, gradient in zip(names, found, strict=True):
        assert relative(gradient, file[f"f64.grad.{name}"]) <= bound, name
    if not packed:
        found = torch.autograd.grad(y, list(published.leaves.values()), cotangents[0])
        for name, gradient in zip(names, found, strict=True):
            assert relative(gradient, file[f"f64.grad_out_only.{name}"]) <= bound, name


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_inputs_sum_in_float32(half: torch.dtype) -> None:
    inputs, state = make(2, 70, 6, 1, 4)
    low = [x.to(half) if i in (0, 1, 3, 4) else x.float() for i, x in enumerate(inputs)]
    y, end = selective_scan(*low, state=state.float())
    wide, wide_end = selective_scan(*[x.float() for x in low], state=state.float())
    assert (y.dtype, end.dtype) == (half, torch.float32)
    assert torch.equal(y, wide.to(half))
    assert torch.equal(end, wide_end)


def make(batch: int, T: int, channels: int, G: int, N: int, *, largest: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """Float64 x, dt in [0, largest], A, B, C; and a state."""
    x, dt = torch.randn(batch, T, channels).double(), largest * torch.rand(batch, T, channels).double()
    A = -torch.exp(torch.randn(channels, N).double())
    B, C = torch.randn(2, batch, T, G, N).double()
    return [x, dt, A, B, C], torch.randn(batch, channels, N).double()


def run(inputs: list[Tensor], state: Tensor, backend: str) -> list[Tensor]:
    """y, the end state, and the gradients of everything under fixed random cotangents."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    y, end = selective_scan(*leaves[:-1], state=leaves[-1], backend=backend)
    noise = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(out.shape, generator=noise, dtype=torch.float64).to(out) for out in (y, end)]
    return [y.detach(), end.detach(), *torch.autograd.grad([y, end], leaves, cotangents)]


@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([1, 2, 7, 8, 9, 31, 32, 33, 64, 75]),
    batch=st.integers(1, 3),
    G=st.integers(1, 3),
    per_group=st.integers(1, 3),
    N=st.integers(1, 5),
    largest=st.sampled_from([0.0, 0.1, 2.0, 50.0, 1e4]),
    seed=st.integers(0, 1 << 30),
)
def test_parallel_equals_reference(
    T: int, batch: int, G: int, per_group: int, N: int, largest: float, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, state = make(batch, T, G * per_group, G, N, largest=largest)
    for fast, slow in zip(run(inputs, state, "torch"), run(inputs, state, "reference"), strict=True):
        assert torch.isfinite(fast).all()
        assert (fast - slow).norm() <= 1e-10 * slow.norm() + 1e-13


def test_a_large_batch_is_walked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, state = make(5, 40, 4, 2, 3)
    want = run(inputs, state, "reference")
    monkeypatch.setattr(parallel, "_LARGEST", 2 * 32 * 12)  # two rows at a time
    for fast, slow in zip(run(inputs, state, "torch"), want, strict=True):
        assert relative(fast, slow) <= 1e-10


@backends
def test_a_huge_step_forgets_exactly(backend: str) -> None:
    inputs, state = make(1, 20, 3, 1, 4)
    inputs[1][:, 9] = 1e6
    inputs, state = [x.requires_grad_() for x in inputs], state.requires_grad_()
    y, end = selective_scan(*inputs, state=state, backend=backend)
    late, late_end = selective_scan(*[x[:, 9:] if x.dim() > 2 else x for x in inputs], backend=backend)
    assert relative(y[:, 9:], late) <= 1e-14
    assert relative(end, late_end) <= 1e-14
    to_state, *others = torch.autograd.grad([y[:, 9:].sum(), end.sum()], [state, *inputs])
    assert not to_state.any()
    assert all(torch.isfinite(gradient).all() for gradient in others)


@backends
def test_a_step_of_zero_changes_nothing(backend: str) -> None:
    inputs, state = make(2, 40, 3, 1, 4, largest=0.0)
    _, end = selective_scan(*inputs, state=state, backend=backend)
    assert torch.equal(end, state)


@backends
def test_softplus_is_torchs(backend: str) -> None:
    """Linear above 20, after the bias, the same in every form."""
    inputs, state = make(1, 6, 3, 1, 2)
    inputs[1] = torch.tensor([-800.0, -30.0, 0.0, 19.0, 20.5, 700.0]).double().view(1, 6, 1).expand(1, 6, 3).clone()
    inputs[2] = inputs[2] * 1e-3
    bias = torch.tensor([0.0, 0.4, -0.6]).double()
    y, end = selective_scan(*inputs, dt_bias=bias, dt_softplus=True, state=state, backend=backend)
    plain = [inputs[0], torch.nn.functional.softplus(inputs[1] + bias), *inputs[2:]]
    want, want_end = selective_scan(*plain, state=state, backend="reference")
    assert relative(y, want) <= 1e-14
    assert relative(end, want_end) <= 1e-14
    now = state
    x, dt, A, B, C = inputs
    for t in range(6):
        out, now = selective_scan_step(
            x[:, t], dt[:, t], A, B[:, t], C[:, t], dt_bias=bias, dt_softplus=True, state=now
        )
        assert relative(out, want[:, t]) <= 1e-14


def test_memory_is_that_of_one_segment() -> None:
    """No tensor with time, channels and N lives beyond a segment: inputs, outputs and boundary states are kept."""
    T, channels, N = 16 * parallel._SEGMENT, 8, 64
    inputs, _ = make(1, T, channels, 1, N)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y, _ = selective_scan(*[x.requires_grad_() for x in inputs])
    y.sum().backward()
    assert kept
    assert max(t.numel() for t in kept) < T * channels * N // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 5, 4)}, r"dt has shape \(2, 5, 4\); accepted is \(batch, T, channels\)"),
        ({"A": torch.zeros(6, 3)}, "N=3|N=4"),
        ({"B": torch.zeros(2, 5, 4, 4)}, "C has shape"),
        ({"B": torch.zeros(2, 5, 4, 4), "C": torch.zeros(2, 5, 4, 4)}, "4 groups, which do not divide 6 channels"),
        ({"D": torch.zeros(6, 4)}, "D has shape"),
        ({"state": torch.zeros(2, 4, 6)}, r"state has shape \(2, 4, 6\); accepted is \(2, 6, 4\)"),
        (
            {"A": torch.zeros(6, 257), "B": torch.zeros(2, 5, 257), "C": torch.zeros(2, 5, 257), "backend": "triton"},
            "N from 1 to 256|cannot serve",
        ),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(2, 5, 6),
        "dt": torch.zeros(2, 5, 6),
        "A": torch.zeros(6, 4),
        "B": torch.zeros(2, 5, 4),
        "C": torch.zeros(2, 5, 4),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        selective_scan(**arguments)  # type: ignore[arg-type]
